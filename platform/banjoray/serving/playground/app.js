// The page: who answers, the form of its task, one request at a time, its answer, and the same request as code.

import { drawn, written } from "./answers.js";
import { asked, Refused } from "./asking.js";
import { element, found } from "./dom.js";
import { formOf } from "./forms.js";
import { snippet } from "./snippets.js";
import { summary, told } from "./timing.js";

let about = null;
let form = null;
let running = null;

// Everything is asked for relative to the page, whatever prefix the application has.
const address = () => new URL(`models/${encodeURIComponent(about.model)}`, document.baseURI).href;
const shownVersion = () => `${about.model}@${about.version}`;

async function read(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`GET ${path}: ${response.status} ${await response.text()}`);
  return response.json();
}

// Of several models the one that the address names, or the first; the others are a link away.
async function chosen() {
  const told = await read("./");
  const models = told.models ?? [told];
  const named = new URLSearchParams(location.search).get("model");
  const mine = models.find(({ model }) => model === named) ?? models[0];
  if (models.length > 1) {
    const links = models.map(({ model }) =>
      element("a", { href: `ui?model=${encodeURIComponent(model)}`, textContent: model }),
    );
    links[models.indexOf(mine)].setAttribute("aria-current", "page");
    found("models").replaceChildren(...links);
    found("models").hidden = false;
  }
  return { ...mine, ...(await read(`ui/about?model=${encodeURIComponent(mine.model)}`)) };
}

function introduce() {
  document.title = `${about.model}, banjoray`;
  found("model").textContent = about.model;
  found("version").textContent = `@${about.version}`;
  const { engine, precision, why } = about.engine;
  const facts = [["Task", about.task, ""], ["Engine", `${engine}, ${precision}`, why]];
  if (about.labels.length) facts.push(["Labels", String(about.labels.length), about.labels.slice(0, 40).join(", ")]);
  const nodes = facts.map(([name, value, title]) =>
    element("div", title ? { title } : {}, element("dt", { textContent: name }), element("dd", { textContent: value })),
  );
  found("facts").replaceChildren(...nodes);
}

// Raises SyntaxError: parameters that are no JSON object.
function parametersGiven() {
  const text = found("parameters").value.trim();
  const given = text === "" ? {} : JSON.parse(text);
  if (given === null || typeof given !== "object" || Array.isArray(given)) throw new SyntaxError("needed an object, {...}");
  return given;
}

function requestGiven() {
  const { inputs, parameters, stream } = form.read();
  const all = { ...parameters, ...parametersGiven() };
  return { inputs, ...(Object.keys(all).length ? { parameters: all } : {}), ...(stream ? { stream: true } : {}) };
}

function showSnippet() {
  const language = document.querySelector("input[name=language]:checked").value;
  try {
    found("snippet").textContent = snippet(language, address(), requestGiven(), about);
    found("copy").disabled = false;
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    found("snippet").textContent = `Parameters: not JSON (${error.message})`;
    found("copy").disabled = true;
  }
}

function showProblem(title, message) {
  found("problem").replaceChildren(
    element("div", { className: "problem" }, element("strong", { textContent: title }), element("p", { textContent: message })),
  );
}

function showError(error) {
  if (!(error instanceof Refused) || error.status === 200) {
    showProblem("No answer", String(error.message));
    return;
  }
  const wait = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  showProblem(String(error.status), error.message + wait);
}

function say(state) {
  // The same words again would be read aloud again.
  if (found("state").textContent !== state) found("state").textContent = state;
}

function busy(now) {
  found("answer").setAttribute("aria-busy", String(now));
  found("send").setAttribute("aria-disabled", String(now));
  // A button that goes would take the focus with it.
  if (!now && document.activeElement === found("stop")) found("send").focus();
  found("stop").hidden = !now;
}

// What a stream has brought until now; a text node that grows, so that a selection in it stays.
function growing() {
  const text = written("");
  text.classList.add("growing");
  found("answer").replaceChildren(text);
  return (answer) => {
    text.textContent = answer.text;
    say("Writing");
    running.seen = answer;
  };
}

function finish(answer, request, state) {
  const nodes = answer.body === undefined ? [written(answer.text)] : drawn(answer.body, about, request);
  found("answer").replaceChildren(...nodes.filter((node) => node !== null));
  found("told").replaceChildren(...told(answer, shownVersion()));
  say(state);
  const mark = document.querySelector(".answer .text mark");
  if (mark) mark.parentElement.scrollTop = mark.offsetTop - mark.parentElement.offsetTop - 40;
}

// On a narrow screen the answer stands below the form, where nobody would see that it has come.
function reveal() {
  const { top } = found("result").getBoundingClientRect();
  if (top < 0 || top > innerHeight * 0.7) found("result").scrollIntoView();
}

function stopped(request) {
  const { seen } = running;
  if (seen) finish(seen, request, `Stopped after ${summary(seen)}`);
  else say("Stopped");
}

async function send() {
  if (running) return;
  found("problem").replaceChildren();
  let request;
  try {
    request = requestGiven();
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    showProblem("Parameters", `not JSON (${error.message})`);
    found("parameters").focus();
    return;
  }
  running = { control: new AbortController(), seen: null };
  found("answer").replaceChildren();
  found("told").replaceChildren();
  busy(true);
  say("Waiting for an answer");
  try {
    const answer = await asked(address(), request, running.control.signal, request.stream ? growing() : null);
    finish(answer, request, "Done");
  } catch (error) {
    if (error.name === "AbortError") {
      stopped(request);
    } else {
      if (running.seen) finish(running.seen, request, "Broken off");
      else say("");
      showError(error);
    }
  } finally {
    running = null;
    busy(false);
    reveal();
  }
}

function stop() {
  if (running) running.control.abort();
}

async function copy() {
  const code = found("snippet");
  try {
    await navigator.clipboard.writeText(code.textContent);
    found("copy").textContent = "Copied";
  } catch {
    // Without TLS a browser gives no clipboard: the code is selected, for the keys that copy.
    getSelection().selectAllChildren(code);
    found("copy").textContent = "Selected";
  }
}

function listen() {
  found("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  found("stop").addEventListener("click", stop);
  found("copy").addEventListener("click", copy);
  document.addEventListener("input", () => {
    found("copy").textContent = "Copy";
    showSnippet();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.isComposing) {
      event.preventDefault();
      send();
    } else if (event.key === "Escape" && running) {
      event.preventDefault();
      stop();
    }
  });
}

async function start() {
  if (/Mac|iPhone|iPad/.test(navigator.platform)) found("control").textContent = "Cmd";
  try {
    about = await chosen();
  } catch (error) {
    showProblem("No answer", String(error.message));
    return;
  }
  introduce();
  form = formOf(about);
  found("fields").replaceChildren(...form.nodes);
  listen();
  showSnippet();
  found("ask").hidden = false;
  found("same").hidden = false;
}

start();
