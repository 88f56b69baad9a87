// Small helpers around the document. Text only ever becomes text nodes: nothing here takes markup.

const SVG = "http://www.w3.org/2000/svg";

/** The element with this id, which the page has. */
export const byId = (id) => document.getElementById(id);

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** A new element; `properties` are attributes, or listeners as `onclick`; children are elements or texts. */
export const h = (tag, properties = {}, ...children) => fill(document.createElement(tag), properties, children);

/** The same for a picture. */
export const svg = (tag, properties = {}, ...children) => fill(document.createElementNS(SVG, tag), properties, children);

/** Set an element's text where it differs, so that nothing is laid out or read aloud again for nothing. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Set an attribute where it differs; `null` removes it. */
export function setAttribute(element, name, value) {
  if (value === null) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

/** Set a length of the element's style, as a part (0 to 1) of the whole. */
export function setPart(element, property, part) {
  const value = `${(Math.min(Math.max(Number.isFinite(part) ? part : 0, 0), 1) * 100).toFixed(2)}%`;
  if (element.style[property] !== value) element.style[property] = value;
}

/** Make the children exactly these, moving as few as can be: the focus stays where it is. */
export function arrange(parent, children) {
  children.forEach((child, index) => {
    if (parent.children[index] !== child) parent.insertBefore(child, parent.children[index] ?? null);
  });
  while (parent.children.length > children.length) parent.lastElementChild.remove();
}

/** The page's colours, resolved for the theme that is shown now. */
export function colours(...names) {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

/** Whether the reader asked for little motion. */
export const wantsLittleMotion = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** The size of an element's content box in CSS pixels; `onResize` is called when it changes. */
export function watchSize(element, onResize) {
  new ResizeObserver(() => onResize()).observe(element);
}
