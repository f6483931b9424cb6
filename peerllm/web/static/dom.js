// Elements and numbers for people. Every text goes in as a text node, so nothing a model or a device says is ever HTML.

export const byId = (id) => document.getElementById(id);

const present = (children) => children.filter((child) => child !== null && child !== undefined && child !== false);

/** An element with properties and children; strings become text nodes, null, undefined and false are left out. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "key") element.dataset.key = value;
    else if (name === "vars") for (const [key, one] of Object.entries(value)) element.style.setProperty(key, one);
    else if (name.startsWith("aria-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...present(children).map((child) => (child instanceof Node ? child : document.createTextNode(String(child)))));
  return element;
}

/** Makes the children of `parent` like `wanted` and leaves alone what is alike, so that focus, selection and clicks stay.
 *
 * A child made with a `key` is found again wherever it stood, any other where it stands now.
 */
export function update(parent, ...wanted) {
  const fresh = present(wanted);
  const keys = new Set(fresh.map((child) => child.dataset?.key));
  const keyed = new Map();
  for (const child of [...parent.children].filter((one) => one.dataset.key)) {
    if (keys.has(child.dataset.key)) keyed.set(child.dataset.key, child);
    else child.remove();
  }
  fresh.forEach((child, index) => {
    let here = parent.childNodes[index] ?? null;
    const key = child.dataset?.key;
    const old = key ? keyed.get(key) : here?.dataset?.key ? null : here;
    while (old && here && here !== old && !here.dataset?.key) { // surplus goes: moving `old` over it would cost its focus
      here.remove();
      here = parent.childNodes[index] ?? null;
    }
    if (old?.nodeName !== child.nodeName) parent.insertBefore(child, here);
    else {
      if (old !== here) parent.insertBefore(old, here);
      adopt(old, child);
    }
  });
  while (parent.childNodes.length > fresh.length) parent.lastChild.remove();
}

/** Gives `old` all that `fresh` has. */
function adopt(old, fresh) {
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  const names = new Set([...old.getAttributeNames(), ...fresh.getAttributeNames()]);
  names.delete("style"); // the page's policy forbids it as an attribute
  for (const name of names) {
    if (!fresh.hasAttribute(name)) old.removeAttribute(name);
    else if (old.getAttribute(name) !== fresh.getAttribute(name)) old.setAttribute(name, fresh.getAttribute(name));
  }
  if (old.style.cssText !== fresh.style.cssText) old.style.cssText = fresh.style.cssText;
  old.onclick = fresh.onclick;
  update(old, ...fresh.childNodes);
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
