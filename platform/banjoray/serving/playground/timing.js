// What is told beside an answer: the version that made it, how many tokens it read, how long each part took.

import { counted, element, milliseconds } from "./dom.js";

const classOf = (name) => name.replaceAll(" ", "-");

function fact(className, name, value) {
  return element("div", { className }, element("dt", {}, name), element("dd", { textContent: value }));
}

// A bar of parts, each as wide as it took, and their times below it; `total` is what they are parts of.
function times(known, total) {
  const rest = total - Object.values(known).reduce((sum, time) => sum + time, 0);
  const parts = Object.entries(rest > 0 ? { ...known, other: rest } : known);
  const bar = element("div", { className: "timeline", "aria-hidden": "true" });
  const list = element("dl", { className: "times" });
  for (const [name, time] of parts) {
    const piece = element("span", { className: classOf(name) });
    piece.style.flexGrow = String(time);
    bar.append(piece);
    const square = element("span", { className: `square ${classOf(name)}`, "aria-hidden": "true" });
    list.append(fact("", [square, name], milliseconds(time)));
  }
  return [bar, list];
}

// The server's times and what they are parts of; of a stream, whose end it can't tell at its start, those seen here.
function timesOf(answer) {
  if (answer.first === undefined) {
    const { total, ...parts } = answer.times;
    return { parts, total };
  }
  if (answer.first === null) return { parts: {}, total: undefined };
  return { parts: { "first token": answer.first, "other tokens": answer.all - answer.first }, total: answer.all };
}

function tokens(answer) {
  const read = answer.tokens === null ? [] : [`${answer.tokens} read`];
  const wrote = answer.written ? [`${answer.written} written`] : [];
  return [...read, ...wrote].join(", ");
}

// Nodes for what is told; `shown` is the version that the page was loaded for.
export function told(answer, shown) {
  const { parts, total } = timesOf(answer);
  const seconds = (answer.all - answer.first) / 1000;
  const version = answer.version === shown ? answer.version : `${answer.version}, not ${shown}`;
  const facts = [
    answer.version && fact("", "Version", version),
    tokens(answer) && fact("", "Tokens", tokens(answer)),
    answer.written > 1 && seconds > 0 && fact("", "Speed", `${Math.round((answer.written - 1) / seconds)} tokens/s`),
    total !== undefined && fact("total", "Total", milliseconds(total)),
  ];
  const list = element("dl", { className: "facts" }, facts.filter((node) => node));
  return [list, ...(total === undefined ? [] : times(parts, total))];
}

export const summary = (answer) => counted(answer.written, "token", "tokens");
