// What is asked, by task: fields, and the inputs and parameters that they come to.

import { element } from "./dom.js";

let numbered = 0;

// A labelled control; the label stands above it.
function field(label, control, ...after) {
  numbered += 1;
  control.id = `field-${numbered}`;
  return element("div", { className: "field" }, element("label", { htmlFor: control.id, textContent: label }), control, ...after);
}

function area(value, rows = 4) {
  return element("textarea", { rows, value });
}

function line(value, settings = {}) {
  return element("input", { type: "text", value, autocomplete: "off", ...settings });
}

function tick(label, checked) {
  const box = element("input", { type: "checkbox", checked });
  return { box, node: element("label", { className: "tick" }, box, element("span", { textContent: label })) };
}

// A number that may be left out.
function number(label, settings) {
  const control = element("input", { type: "number", placeholder: "as trained", ...settings });
  return { node: field(label, control), read: () => (control.value === "" ? undefined : Number(control.value)) };
}

function oneText(label, example, parameters = {}) {
  const text = area(example);
  return { nodes: [field(label, text)], read: () => ({ inputs: text.value, parameters }) };
}

function classification(about) {
  const pairs = about.cells.includes("text_pair");
  if (!pairs) return oneText("Text", "what a lovely surprise");
  const text = area("A man plays the banjo.", 3);
  const second = area("Somebody makes music.", 3);
  return {
    nodes: [field("Text", text), field("Second text", second)],
    read: () => ({ inputs: { text: text.value, text_pair: second.value }, parameters: {} }),
  };
}

function zeroShot() {
  const text = area("The train to Lyon leaves an hour late.");
  const labels = line("travel, music, cooking");
  const several = tick("Several labels may apply", false);
  return {
    nodes: [field("Text", text), field("Labels, with commas between them", labels), several.node],
    read: () => {
      const named = labels.value.split(",").map((label) => label.trim());
      const parameters = { candidate_labels: named.filter((label) => label !== "") };
      return { inputs: text.value, parameters: several.box.checked ? { ...parameters, multi_label: true } : parameters };
    },
  };
}

function answering() {
  const question = line("Where does the train go?");
  const context = area("The train to Lyon leaves an hour late, from platform seven.", 6);
  return {
    nodes: [field("Question", question), field("Context", context)],
    read: () => ({ inputs: { question: question.value, context: context.value }, parameters: {} }),
  };
}

function filling(about) {
  const text = area(`I feel so ${about.mask} today.`);
  const insert = element("button", { type: "button", className: "small", textContent: `Insert ${about.mask}` });
  insert.addEventListener("click", () => {
    text.setRangeText(about.mask, text.selectionStart, text.selectionEnd, "end");
    text.focus();
    text.dispatchEvent(new Event("input", { bubbles: true }));
  });
  return { nodes: [field("Text", text, insert)], read: () => ({ inputs: text.value, parameters: {} }) };
}

// Texts to compare; two at the least.
function comparing() {
  const list = element("div", { className: "texts" });
  const more = element("button", { type: "button", className: "small", textContent: "Add a text" });
  const areas = () => [...list.querySelectorAll("textarea")];

  function arrange() {
    [...list.children].forEach((row, at) => {
      row.querySelector("label").textContent = `Text ${at + 1}`;
      const leave = row.querySelector("button");
      leave.hidden = list.children.length <= 2;
      leave.setAttribute("aria-label", `Remove text ${at + 1}`);
    });
    list.dispatchEvent(new Event("input", { bubbles: true }));
  }

  function add(value) {
    const control = area(value, 2);
    const leave = element("button", { type: "button", className: "small plain", textContent: "Remove" });
    const row = field("", control, leave);
    leave.addEventListener("click", () => {
      const next = row.nextElementSibling || row.previousElementSibling;
      row.remove();
      arrange();
      next.querySelector("textarea").focus();
    });
    list.append(row);
    return control;
  }

  ["What a lovely surprise.", "Nobody told me, and I am glad.", "The invoice is due on Friday."].forEach(add);
  more.addEventListener("click", () => {
    const control = add("");
    arrange();
    control.focus();
  });
  arrange();
  return { nodes: [list, more], read: () => ({ inputs: areas().map((text) => text.value), parameters: {} }) };
}

function writing() {
  const prompt = area("Once upon a time", 5);
  const most = number("Most new tokens", { min: "1", step: "1", inputmode: "numeric" });
  const temperature = number("Temperature", { min: "0", step: "0.1", inputmode: "decimal" });
  const stream = tick("Show every token as it is written", true);
  return {
    nodes: [field("Prompt", prompt), element("div", { className: "row" }, most.node, temperature.node), stream.node],
    read: () => {
      const asked = { max_new_tokens: most.read(), temperature: temperature.read() };
      const known = Object.entries(asked).filter(([, value]) => value !== undefined);
      return { inputs: prompt.value, parameters: Object.fromEntries(known), stream: stream.box.checked };
    },
  };
}

const LONG = "The train to Lyon leaves an hour late, from platform seven. Those who have a seat in the first carriage " +
  "are asked to wait in the hall, where tea is served.";

const FORMS = {
  "text-classification": classification,
  "zero-shot-classification": zeroShot,
  "token-classification": () =>
    oneText("Text", "Ada Lund meets Cleo in New Ulm today.", { aggregation_strategy: "simple" }),
  "question-answering": answering,
  "fill-mask": filling,
  "feature-extraction": comparing,
  "text-generation": writing,
  summarization: () => oneText("Text", LONG),
  translation: () => oneText("Text", "The train leaves an hour late."),
};

// The form of the task in `about`: its nodes, and `read`, which gives inputs, parameters, and stream where it is asked for.
export function formOf(about) {
  const make = FORMS[about.task] || (() => oneText("Text", ""));
  return make(about);
}
