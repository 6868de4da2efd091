// Runs a report page's script under a stand-in for the browser's document, and prints what it drew.
//
//     node page.js report.html '[["words", "value", "dog", "oninput"], ...]'
//
// Each action sets a property of the element with that id and calls its handler. What is printed is {id: tree}, where a
// tree is a text or [tag, {attributes}, ...trees]. The document knows no innerHTML: a page that used it would fail.
"use strict";
const fs = require("fs");
const vm = require("vm");

class Node {
  constructor(tag) { this.tag = tag; this.attributes = {}; this.children = []; this.checked = false; }
  setAttribute(name, value) { this.attributes[name] = String(value); }
  prepend(...nodes) { const rest = this.children; this.children = []; this.append(...nodes, ...rest); }
  append(...nodes) { for (const node of nodes) this.children.push(node instanceof Node ? node : String(node)); }
  replaceChildren(...nodes) { this.children = []; this.chosen = undefined; this.append(...nodes); }
  get textContent() { return this.children.map(node => node instanceof Node ? node.textContent : node).join(""); }
  set textContent(text) { this.children = [String(text)]; }
  get value() { return this.chosen ?? this.children[0]?.attributes?.value ?? this.attributes.value ?? ""; }
  set value(value) { this.chosen = String(value); }
  set innerHTML(text) { throw new Error("innerHTML"); }
  set outerHTML(text) { throw new Error("outerHTML"); }
  insertAdjacentHTML() { throw new Error("insertAdjacentHTML"); }
  tree() { return [this.tag, this.attributes, ...this.children.map(node => node instanceof Node ? node.tree() : node)]; }
}

const page = fs.readFileSync(process.argv[2], "utf8");
const elements = {};
for (const [, tag, id] of page.matchAll(/<(\w+)[^>]* id="([\w-]+)"/g)) elements[id] = new Node(tag);
const scripts = [...page.matchAll(/<script[^>]*>([^]*?)<\/script>/g)].map(match => match[1]);
if (scripts.length !== 2) throw new Error(`${scripts.length} scripts in the page, not its data and its code`);
elements.data.textContent = scripts[0];
const document = {
  getElementById: id => elements[id],
  createElement: tag => new Node(tag),
  createElementNS: (space, tag) => new Node(tag),
};
vm.runInNewContext(scripts[1], {document});
for (const [id, property, value, handler] of JSON.parse(process.argv[3] || "[]")) {
  elements[id][property] = value;
  elements[id][handler]();
}
const drawn = {};
for (const [id, element] of Object.entries(elements)) if (id !== "data") drawn[id] = element.tree();
console.log(JSON.stringify(drawn));
