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
NVLINK_ACHIEVED = 0.78  # of its one direction
WITHOUT_NVLINK = 12e9  # bytes a second of an all-gather over PCIe 4, through the host
PCIE = {3: 12e9, 4: 24e9, 5: 50e9}  # bytes a second to pinned host memory, of 16, 32 and 63 GB/s
LAUNCH = {3: 25e-6, 4: 18e-6, 5: 13e-6}  # seconds a kernel in eager PyTorch: the host is as old as its PCIe

# GiB as the driver reports them; TFLOP/s; GB/s of its memory; GB/s of NVLink in one direction (0: none); PCIe
# generation; GB/s of the memory of the hosts that usually have it.
DATA_SHEETS = """
B200      179    2250  8000  900  5  400
H200      140     989  4800  450  5  200
H100       79.2   989  3350  450  5  200
A100-80    79.2   312  2039  300  4  150
A100-40    39.5   312  1555  300  4  150
L40S       44.5   362   864    0  4  150
6000Ada    47.5   364   960    0  4  150
A6000      47.5   155   768    0  4  150
A10G       22.0    70   600    0  4  100
L4         22.0   121   300    0  4  100
RTX5090    31.4   210  1792    0  5   60
RTX4090    23.5   165  1008    0  4   50
RTX3090    23.5    71   936    0  4   50
"""


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


def card(row: str) -> Card:
    """A line of DATA_SHEETS."""
    name, *columns = row.split()
    gib, peak, bandwidth, nvlink, generation, host = map(float, columns)
    link = WITHOUT_NVLINK
    if nvlink:
        link = NVLINK_ACHIEVED * nvlink * 1e9
    return Card(
        name=name,
        memory=gib,
        flops=FLOPS_ACHIEVED * peak * 1e12,
        bandwidth=MEMORY_ACHIEVED * bandwidth * 1e9,
        link=link,
        pcie=PCIE[generation],
        host=host * 1e9,
        launch=LAUNCH[generation],
    )


CARDS = list(map(card, DATA_SHEETS.split("\n")[1:-1]))
UNKNOWN = replace(card("unknown 0 70 600 0 3 50"), name="a card not in cards.py, at modest rates")


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
