// What was answered, by task, as nodes.

import { counted, element, percent, points } from "./dom.js";

const SHOWN = 12;
const COLOURS = 6;
const LONG = 28;

const isShare = (score) => score >= 0 && score <= 1;
const figure = (number) => String(Number(number.toPrecision(4)));
const score = (number) => (isShare(number) ? percent(number) : figure(number));

function headline(text, aside) {
  const size = text.length > LONG ? "headline long" : "headline";
  const share = aside ? element("span", { textContent: aside }) : null;
  return element("p", { className: size }, element("strong", { textContent: text }), share);
}

// Entries of {name, share, strong} as a list of bars, the first ones; the rest can be unfolded.
function bars(entries) {
  const scaled = entries.every((entry) => isShare(entry.share));
  const rows = entries.map((entry) => {
    const fill = element("span", { className: "fill" });
    if (scaled) fill.style.inlineSize = `${entry.share * 100}%`;
    return element(
      "li",
      { className: entry.strong ? "strong" : "" },
      element("span", { className: "name", textContent: entry.name }),
      element("span", { className: "score", textContent: scaled ? percent(entry.share) : figure(entry.share) }),
      scaled ? element("span", { className: "track", "aria-hidden": "true" }, fill) : null,
    );
  });
  const first = element("ol", { className: "bars" }, rows.slice(0, SHOWN));
  if (rows.length <= SHOWN) return [first];
  const rest = element("ol", { className: "bars", start: SHOWN + 1 }, rows.slice(SHOWN));
  const told = element("summary", { textContent: `${rows.length - SHOWN} more` });
  return [first, element("details", { className: "rest" }, told, rest)];
}

function labels(entries, about) {
  if (about.problem_type === "regression") return [headline(figure(entries[0].score))];
  const several = entries.some((entry) => "predicted" in entry);
  const strong = (entry, at) => (several ? entry.predicted : at === 0);
  const named = entries.filter(strong);
  const told = named.length ? named.map((entry) => entry.label).join(", ") : "No label";
  return [
    headline(told, named.length === 1 ? score(named[0].score) : null),
    ...bars(entries.map((entry, at) => ({ name: entry.label, share: entry.score, strong: strong(entry, at) }))),
  ];
}

// A text, code point by code point, in which spans of {start, end} are put between what `mark` makes of them.
function marked(text, spans, mark) {
  const letters = points(text);
  const nodes = [];
  let at = 0;
  for (const span of [...spans].sort((one, other) => one.start - other.start || other.end - one.end)) {
    if (span.start < at || span.end <= span.start) continue;
    nodes.push(letters.slice(at, span.start).join(""), mark(span, letters.slice(span.start, span.end).join("")));
    at = span.end;
  }
  nodes.push(letters.slice(at).join(""));
  return nodes;
}

function entities(found, about, request) {
  const kinds = [];
  const mark = (entity, words) => {
    const kind = entity.entity_group || entity.entity;
    if (!kinds.includes(kind)) kinds.push(kind);
    return element(
      "mark",
      { className: `entity kind-${kinds.indexOf(kind) % COLOURS}` },
      element("span", { className: "words", textContent: words }),
      element("span", { className: "kind", textContent: `${kind} ${score(entity.score)}` }),
    );
  };
  const text = element("p", { className: "text tagged" }, marked(request.inputs, found, mark));
  const told = found.length ? counted(found.length, "entity", "entities") : "No entity";
  return [headline(told), text];
}

function answers(body, about, request) {
  const found = Array.isArray(body) ? body : [body];
  const [best] = found;
  const mark = (span, words) => element("mark", { className: "entity kind-0", textContent: words });
  const context = element("p", { className: "text" }, marked(request.inputs.context, [best], mark));
  context.tabIndex = 0;
  const rest = found.slice(1).map((entry) => ({ name: entry.answer || "no answer", share: entry.score, strong: false }));
  return [headline(best.answer || "No answer in this context", score(best.score)), context, ...(rest.length ? bars(rest) : [])];
}

const word = (text) => text.trim() || JSON.stringify(text);

function words(body) {
  const masks = Array.isArray(body[0]) ? body : [body];
  return masks.flatMap((entries, at) => [
    masks.length > 1 ? element("h3", { textContent: `Mask ${at + 1}` }) : null,
    headline(word(entries[0].token_str), score(entries[0].score)),
    masks.length > 1 ? null : element("p", { className: "text", textContent: entries[0].sequence }),
    ...bars(entries.map((entry, place) => ({ name: word(entry.token_str), share: entry.score, strong: place === 0 }))),
  ]);
}

function cosine(one, other) {
  const dot = (left, right) => left.reduce((sum, number, at) => sum + number * right[at], 0);
  return dot(one, other) / Math.sqrt(dot(one, one) * dot(other, other));
}

// Cosines of all pairs as a table; texts by their numbers, rows by the texts too.
function similarities(vectors, about, request) {
  const head = element("tr", {}, element("td"), vectors.map((_, at) => element("th", { scope: "col", textContent: at + 1 })));
  const rows = vectors.map((vector, row) => {
    const cells = vectors.map((other, column) => {
      const value = cosine(vector, other);
      const cell = element("td", { className: row === column ? "itself" : "", textContent: value.toFixed(2) });
      cell.style.setProperty("--share", `${Math.round(Math.max(0, value) * 40)}%`);
      return cell;
    });
    const name = element("span", { className: "cut", textContent: request.inputs[row] });
    return element("tr", {}, element("th", { scope: "row" }, element("span", { textContent: `${row + 1} ` }), name), cells);
  });
  const table = element("table", { className: "cosines" }, element("thead", {}, head), element("tbody", {}, rows));
  const width = counted(vectors[0].length, "number", "numbers");
  return [
    element("div", { className: "scrolls", tabindex: "0", role: "group", "aria-label": "Cosine similarities" }, table),
    element("p", { className: "note", textContent: `Cosine similarity; a text is a vector of ${width}.` }),
  ];
}

export function written(text) {
  return element("p", { className: "text written", textContent: text });
}

const DRAWN = {
  "text-classification": (body, about) => labels(body[0], about),
  "zero-shot-classification": labels,
  "token-classification": entities,
  "question-answering": answers,
  "fill-mask": words,
  "feature-extraction": similarities,
  "text-generation": (body) => [written(body[0].generated_text)],
  summarization: (body) => [written(body[0].summary_text)],
  translation: (body) => [written(body[0].translation_text)],
};

// Nodes for the body of an answer to `request`; of a task that is not known here, its JSON.
export function drawn(body, about, request) {
  const draw = DRAWN[about.task];
  return draw ? draw(body, about, request) : [element("pre", { textContent: JSON.stringify(body, null, 2) })];
}
