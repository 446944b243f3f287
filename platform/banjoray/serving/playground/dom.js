// Elements of the page. What users and models write goes in as text: nothing here reads HTML.

const PROPERTIES = new Set(["textContent", "className", "htmlFor", "type", "value", "checked", "hidden", "id", "rows"]);

// An element with properties, attributes and children; children are nodes or text, null ones are left out.
export function element(name, settings = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(settings)) {
    if (PROPERTIES.has(key)) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

export const found = (id) => document.getElementById(id);

// Python counts code points and JavaScript halves of some of them: a text's code points, which offsets count.
export const points = (text) => Array.from(text);

// A share as people read it.
export function percent(share) {
  const shown = share * 100;
  return `${shown >= 99.95 || shown < 0.05 ? Math.round(shown) : shown.toFixed(1)} %`;
}

// Milliseconds as people read them.
export const milliseconds = (time) => `${time < 10 ? time.toFixed(1) : Math.round(time)} ms`;

export const counted = (number, one, many) => `${number} ${number === 1 ? one : many}`;
