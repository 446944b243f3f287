// What is told beside an answer: the version that made it, how many tokens it read, how long each part took.

import { counted, element, milliseconds } from "./dom.js";

const classOf = (name) => name.replaceAll(" ", "-");

function part(name, time, square) {
  const told = element("dd", { textContent: milliseconds(time) });
  return element("div", { className: square ? "" : "total" }, element("dt", {}, square, name), told);
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
    list.append(part(name, time, element("span", { className: `square ${classOf(name)}`, "aria-hidden": "true" })));
  }
  list.append(part("total", total, null));
  return [bar, list];
}

// The server's times; of a stream, whose end it can't tell at its start, those that were seen here.
function timesOf(answer) {
  if (answer.first === undefined) {
    const { total, ...parts } = answer.times;
    return total === undefined ? [] : times(parts, total);
  }
  if (answer.first === null) return [];
  return times({ "first token": answer.first, "other tokens": answer.all - answer.first }, answer.all);
}

function tokens(answer) {
  const read = answer.tokens === null ? [] : [`${answer.tokens} read`];
  const wrote = answer.written ? [`${answer.written} written`] : [];
  return [...read, ...wrote].join(", ");
}

// Nodes for what is told; `shown` is the version that the page was loaded for.
export function told(answer, shown) {
  const facts = element("dl", { className: "facts" });
  const fact = (name, value) => facts.append(element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value })));
  if (answer.version) fact("Version", answer.version === shown ? answer.version : `${answer.version}, not ${shown}`);
  if (tokens(answer)) fact("Tokens", tokens(answer));
  const seconds = (answer.all - answer.first) / 1000;
  if (answer.written > 1 && seconds > 0) fact("Speed", `${Math.round((answer.written - 1) / seconds)} tokens/s`);
  return [facts, ...timesOf(answer)];
}

export const summary = (answer) => counted(answer.written, "token", "tokens");
