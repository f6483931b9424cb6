// Elements and numbers for people. Every text goes in as a text node, so nothing a model or a device says is ever HTML.

export const byId = (id) => document.getElementById(id);

/** An element with properties and children; strings become text nodes, null and false are left out. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "vars") for (const [key, one] of Object.entries(value)) element.style.setProperty(key, one);
    else if (name.startsWith("aria-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== false).map((child) =>
    child instanceof Node ? child : document.createTextNode(String(child))));
  return element;
}

/** "12.5 MB", in powers of 1000. */
export function bytes(count) {
  let value = Number(count) || 0;
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (Math.abs(value) < 1000) return `${unit === "B" ? value.toFixed(0) : value.toFixed(value < 10 ? 1 : 0)} ${unit}`;
    value /= 1000;
  }
  return `${value.toFixed(1)} TB`;
}

export const count = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;

/** A bar that is `share` full; `label` says so to those who do not see it. */
export function bar(share, label) {
  const percent = Math.round(100 * Math.min(1, Math.max(0, share || 0)));
  return make("div", { className: "bar", role: "img", "aria-label": label }, make("i", { vars: { width: `${percent}%` } }));
}
