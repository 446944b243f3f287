// The request as code that can be copied: curl, Python, JavaScript. A key is read from the variable KEY.

const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function curl(address, request, keys) {
  const lines = [
    `curl -s${request.stream ? "N" : ""} ${shell(address)}`,
    "-H 'content-type: application/json'",
    ...(keys ? ['-H "Authorization: Bearer $KEY"'] : []),
    `-d ${shell(JSON.stringify(request))}`,
  ];
  return lines.join(" \\\n  ");
}

// A value in Python's words. JSON's texts are Python's too.
function python(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([key, inner]) => `${JSON.stringify(key)}: ${python(inner)}`).join(", ")}}`;
}

// Task -> the client's method, what it calls the parameters, and what it makes of the inputs.
const METHODS = {
  "text-classification": ["text_classification", "top_k function_to_apply"],
  "zero-shot-classification": ["zero_shot_classification", "candidate_labels multi_label hypothesis_template"],
  "token-classification": ["token_classification", "aggregation_strategy ignore_labels stride"],
  "question-answering": [
    "question_answering",
    "align_to_words doc_stride handle_impossible_answer max_answer_len max_question_len max_seq_len top_k",
  ],
  "fill-mask": ["fill_mask", "targets top_k"],
  "feature-extraction": ["feature_extraction", "normalize truncate truncation_direction"],
  "text-generation": [
    "text_generation",
    "do_sample max_new_tokens repetition_penalty return_full_text seed stop temperature top_k top_p truncate",
  ],
  summarization: ["summarization", "clean_up_tokenization_spaces generate_parameters truncation"],
  translation: ["translation", "src_lang tgt_lang clean_up_tokenization_spaces generate_parameters truncation"],
};

// Without a key the client would send the Hugging Face token of whoever runs it.
const keyOf = (keys) => (keys ? 'os.environ["KEY"]' : '"none"');

function client(address, request, keys, [method]) {
  const { inputs, parameters = {} } = request;
  const named = method === "question_answering" ? { ...inputs, ...parameters } : parameters;
  const asked = method === "question_answering" ? [] : [python(inputs)];
  asked.push(...Object.entries(named).map(([name, value]) => `${name}=${python(value)}`));
  if (request.stream) asked.push("stream=True");
  const call = `client.${method}(${asked.join(", ")})`;
  return [
    ...(keys ? ["import os", ""] : []),
    "from huggingface_hub import InferenceClient",
    "",
    "client = InferenceClient(",
    `    model=${python(address)},`,
    `    api_key=${keyOf(keys)},`,
    ")",
    ...(request.stream ? [`for token in ${call}:`, '    print(token, end="", flush=True)'] : [`print(${call})`]),
  ];
}

// For parameters that the client has no name for.
function plain(address, request, keys) {
  const headers = keys ? ', headers={"Authorization": f"Bearer {os.environ[\'KEY\']}"}' : "";
  const stream = request.stream ? ", stream=True" : "";
  return [
    ...(keys ? ["import os", ""] : []),
    "import requests",
    "",
    `response = requests.post(${python(address)}, json=${python(request)}${headers}${stream})`,
    ...(request.stream
      ? ["for line in response.iter_lines(decode_unicode=True):", "    print(line)"]
      : ["print(response.json())"]),
  ];
}

function pythonCode(address, request, keys, task) {
  const known = METHODS[task];
  const fits = known && Object.keys(request.parameters || {}).every((name) => known[1].split(" ").includes(name));
  return (fits ? client(address, request, keys, known) : plain(address, request, keys)).join("\n");
}

function javascript(address, request, keys) {
  const body = JSON.stringify(request, null, 2).replaceAll("\n", "\n  ");
  const lines = [
    `const response = await fetch(${JSON.stringify(address)}, {`,
    '  method: "POST",',
    "  headers: {",
    '    "content-type": "application/json",',
    ...(keys ? ["    Authorization: `Bearer ${process.env.KEY}`,"] : []),
    "  },",
    `  body: JSON.stringify(${body}),`,
    "});",
    ...(request.stream
      ? ["for await (const events of response.body.pipeThrough(new TextDecoderStream())) {", "  console.log(events);", "}"]
      : ["console.log(await response.json());"]),
  ];
  return lines.join("\n");
}

const WRITTEN = { curl, python: pythonCode, javascript };

// The request to `address` in a language: curl, python, javascript.
export function snippet(language, address, request, about) {
  return WRITTEN[language](address, request, about.keys, about.task);
}
