"""What the usual GPUs are and achieve, for the plan's model of seconds.

The vendor's figures are from NVIDIA's data sheets of each card (dense bf16 with fp32 accumulation, memory,
memory bandwidth, NVLink or PCIe generation). What is achieved of them is assumed, and stated below;
`bash run.sh test gpu` writes modelled seconds beside measured ones.
"""

import re
from dataclasses import dataclass, replace

import torch

FLOPS_ACHIEVED = 0.42  # of the peak, by training on rows of a few thousand tokens
MEMORY_ACHIEVED = 0.84  # of the bandwidth, by kernels that stream
PCIE_3, PCIE_4, PCIE_5 = 12e9, 24e9, 50e9  # bytes a second to pinned host memory, of 16, 32 and 63 GB/s
NO_NVLINK = 12e9  # bytes a second of an all-gather over PCIe 4, through the host
NVLINK = 0.78  # achieved of its one direction
LAUNCH = {
    PCIE_5: 13e-6,
    PCIE_4: 18e-6,
    PCIE_3: 25e-6,
}  # seconds a kernel, in eager PyTorch, by the host's age


@dataclass(frozen=True)
class Card:
    """Rates are achieved ones: FLOP/s, bytes/s, seconds."""

    name: str
    memory: float  # GiB
    flops: float
    bandwidth: float
    link: float  # between two GPUs of a node
    pcie: float  # to and from pinned host memory
    host: float  # bandwidth of the host memory that such cards usually have, shared by a node's processes
    launch: float  # seconds from one kernel's launch to the next


def card(
    name: str, gib: float, peak: float, bandwidth: float, nvlink: float, pcie: float, host: float
) -> Card:
    """From the data sheet: TFLOP/s, GB/s, GB/s in one direction (0: none), bytes/s, GB/s."""
    link = NO_NVLINK
    if nvlink:
        link = NVLINK * nvlink * 1e9
    flops = FLOPS_ACHIEVED * peak * 1e12
    return Card(name, gib, flops, MEMORY_ACHIEVED * bandwidth * 1e9, link, pcie, host * 1e9, LAUNCH[pcie])


CARDS = [  # GiB as the driver reports them
    card("B200", 179, 2250, 8000, 900, PCIE_5, 400),
    card("H200", 140, 989, 4800, 450, PCIE_5, 200),
    card("H100", 79.2, 989, 3350, 450, PCIE_5, 200),
    card("A100-80", 79.2, 312, 2039, 300, PCIE_4, 150),
    card("A100-40", 39.5, 312, 1555, 300, PCIE_4, 150),
    card("L40S", 44.5, 362, 864, 0, PCIE_4, 150),
    card("6000 Ada", 47.5, 364, 960, 0, PCIE_4, 150),
    card("A6000", 47.5, 155, 768, 0, PCIE_4, 150),
    card("A10G", 22.0, 70, 600, 0, PCIE_4, 100),
    card("L4", 22.0, 121, 300, 0, PCIE_4, 100),
    card("RTX 5090", 31.4, 210, 1792, 0, PCIE_5, 60),
    card("RTX 4090", 23.5, 165, 1008, 0, PCIE_4, 50),
    card("RTX 3090", 23.5, 71, 936, 0, PCIE_4, 50),
]
UNKNOWN = replace(
    card("unknown card", 0, 70, 600, 0, PCIE_3, 50), name="a card not in cards.py, modest rates"
)


def find_card(name: str, gib: float, device: torch.device) -> Card:
    """The card of a name, or of `device` where there is none; modest rates if the list does not have it.

    `gib` (0: not known) tells two cards of one name apart.
    """
    if not name and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = properties.name
        gib = properties.total_memory / 2**30
    asked = letters(name)
    named = [known for known in CARDS if is_named(known, asked)]
    if not named:
        return UNKNOWN
    return min(
        named, key=lambda known: (letters(known.name) != asked, -len(known.name), abs(known.memory - gib))
    )


def is_named(known: Card, asked: str) -> bool:
    """Whether "nvidiageforcertx4090" or "4090" means the card."""
    base = letters(known.name.split("-")[0])
    return len(asked) > 1 and (base in asked or asked in letters(known.name))


def letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
