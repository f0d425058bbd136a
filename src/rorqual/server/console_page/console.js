// The console: one conversation, kept in this browser, talking to this server's own API.
// No framework and no build step; the page's policy allows nothing from elsewhere.

const $ = (id) => document.getElementById(id);
const STORE = "rorqual-console";
const HISTORY = 120; // samples in a chart, one a second

const saved = JSON.parse(localStorage.getItem(STORE) ?? "{}");
const state = {
  messages: saved.messages ?? [], // Chat Completions messages, plus `usage`, `timing`, `problem`
  settings: { key: "", system: "", maxTokens: "", temperature: "", theme: "auto", mode: "non-think",
    tools: "", prices: { hit: 0.028, miss: 0.14, output: 0.28 }, ...saved.settings },
  documents: [], // {name, text}
  running: null, // AbortController of the answer being written
};

function save() {
  try {
    localStorage.setItem(STORE, JSON.stringify({ messages: state.messages, settings: state.settings }));
  } catch { // the store is full: the conversation still works, it just will not survive a reload
    notice("This conversation is too large to be kept across a reload.");
  }
}

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// ---- talking to the server -----------------------------------------------------------------

function headers() {
  const key = state.settings.key;
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function getJSON(path) {
  const response = await fetch(path, { headers: headers(), signal: AbortSignal.timeout(5000) });
  if (!response.ok) throw new Error(`${response.status}`);
  return response.json();
}

function requestBody() {
  const { system, maxTokens, temperature, mode, tools } = state.settings;
  const messages = state.messages.filter((m) => !m.problem || m.content || m.tool_calls).map((m) => {
    const { role, content, reasoning_content, tool_calls, tool_call_id } = m;
    return { role, content: content ?? "", ...(reasoning_content ? { reasoning_content } : {}),
      ...(tool_calls?.length ? { tool_calls } : {}), ...(tool_call_id ? { tool_call_id } : {}) };
  });
  const body = { model: $("model").value, stream: true, stream_options: { include_usage: true },
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    thinking: { type: mode === "non-think" ? "disabled" : "enabled" } };
  if (mode !== "non-think") body.reasoning_effort = mode === "think-max" ? "max" : "high";
  if (tools.trim()) body.tools = JSON.parse(tools);
  if (maxTokens) body.max_tokens = Number(maxTokens);
  if (temperature !== "") body.temperature = Number(temperature);
  return body;
}

// Server-sent events of a response, parsed as JSON; comments are dropped.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function absorb(message, event, began) {
  if (event.error) throw new Error(event.error.message ?? "the answer broke off");
  if (event.usage) message.usage = event.usage;
  const choice = event.choices?.[0];
  if (!choice) return;
  const delta = choice.delta ?? {};
  if (delta.reasoning_content) message.reasoning_content = (message.reasoning_content ?? "") + delta.reasoning_content;
  if (delta.content) message.content += delta.content;
  for (const part of delta.tool_calls ?? []) {
    message.tool_calls ??= [];
    const call = (message.tool_calls[part.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
    if (part.id) call.id = part.id;
    if (part.function?.name) call.function.name += part.function.name;
    if (part.function?.arguments) call.function.arguments += part.function.arguments;
  }
  if (choice.finish_reason) message.finish = choice.finish_reason;
  if (!message.timing && (delta.content || delta.reasoning_content || delta.tool_calls)) {
    message.timing = { first: performance.now() - began };
  }
}

async function answer() {
  let body;
  try {
    body = requestBody();
  } catch (error) {
    $("tools-pane").hidden = false;
    notice(`The tools are not valid JSON: ${error.message}`);
    return;
  }
  notice("");
  const message = { role: "assistant", content: "", mode: state.settings.mode };
  state.messages.push(message);
  const view = show(message);
  const control = (state.running = new AbortController());
  busy(true);
  const began = performance.now();
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: control.signal });
    if (!response.ok) {
      const problem = await response.json().catch(() => null);
      throw new Error(problem?.error?.message ?? `the server answered ${response.status}`);
    }
    for await (const event of events(response)) {
      absorb(message, event, began);
      view.update();
    }
    if (!message.finish) throw new Error("the connection closed before the answer was complete");
  } catch (error) {
    if (control.signal.aborted) message.finish = "stopped";
    else message.problem = error instanceof TypeError ? "The server cannot be reached. It may be restarting." : error.message;
  }
  if (message.timing) message.timing.total = performance.now() - began;
  state.running = null;
  busy(false);
  view.update();
  save();
}

function send(text) {
  const documents = state.documents.map((d) => `Document: ${d.name}\n${d.text}\n\n`).join("");
  state.messages.push({ role: "user", content: documents + text });
  show(state.messages.at(-1));
  state.documents = [];
  showDocuments();
  save();
  answer();
}

// ---- showing the conversation --------------------------------------------------------------

// Text with ``` fences and `code` marked; built from nodes, so nothing in it is ever markup.
function richText(text) {
  return text.split(/^```[^\n]*\n([\s\S]*?)(?:^```[ \t]*$\n?|(?![\s\S]))/m).map((part, i) => {
    if (i % 2) return element("pre", {}, part.replace(/\n$/, ""));
    const spans = part.split(/`([^`\n]+)`/).map((s, j) => (j % 2 ? element("code", {}, s) : s));
    return element("span", {}, ...spans);
  });
}

function money(usage) {
  const { hit, miss, output } = state.settings.prices;
  const cached = usage.prompt_cache_hit_tokens ?? usage.prompt_tokens_details?.cached_tokens ?? 0;
  const dollars = (cached * hit + (usage.prompt_tokens - cached) * miss + usage.completion_tokens * output) / 1e6;
  return `$${dollars < 0.01 ? dollars.toPrecision(2) : dollars.toFixed(3)}`;
}

function counts(message) {
  const parts = [];
  const usage = message.usage;
  if (usage) {
    const cached = usage.prompt_cache_hit_tokens ?? usage.prompt_tokens_details?.cached_tokens ?? 0;
    const reasoning = usage.completion_tokens_details?.reasoning_tokens ?? 0;
    parts.push(`${usage.prompt_tokens} prompt (${cached} cached)`);
    if (reasoning) parts.push(`${reasoning} reasoning`);
    parts.push(`${usage.completion_tokens - reasoning} answer`, money(usage));
    const writing = (message.timing?.total ?? 0) - (message.timing?.first ?? 0);
    if (writing > 0 && usage.completion_tokens > 1) parts.push(`${((usage.completion_tokens - 1) / writing * 1000).toFixed(1)} tokens/s`);
  }
  if (message.timing) parts.push(`first token ${Math.round(message.timing.first)} ms`);
  if (message.mode) parts.push(message.mode);
  if (message.finish === "length") parts.push("cut at the longest answer");
  if (message.finish === "stopped") parts.push("stopped");
  return parts.join(" · ");
}

function toolCard(call, results) {
  const card = element("div", { class: "call" }, element("h3", {}, `${call.function.name}()`));
  let shown = call.function.arguments;
  try { shown = JSON.stringify(JSON.parse(shown), null, 2); } catch { /* still arriving, or malformed: show it raw */ }
  card.append(element("pre", {}, shown));
  const result = results.get(call.id);
  if (result !== undefined) card.append(element("div", { class: "quiet" }, "Result"), element("pre", {}, result));
  else if (!state.running) {
    const input = element("input", { "aria-label": `Result of ${call.function.name}`, placeholder: 'Result, for example {"status": "ok"}' });
    card.append(element("form", { onsubmit: (event) => { event.preventDefault(); giveResult(call, input.value); } },
      input, element("button", {}, "Give result")));
  }
  return card;
}

function giveResult(call, content) {
  if (state.running) return;
  state.messages.push({ role: "tool", tool_call_id: call.id, content });
  save();
  const asked = state.messages.findLast((m) => m.tool_calls?.length)?.tool_calls ?? [];
  const given = new Set(state.messages.filter((m) => m.role === "tool").map((m) => m.tool_call_id));
  render();
  if (asked.every((c) => given.has(c.id))) answer();
}

function show(message) {
  if (message.role === "tool") return null; // shown inside the call's card
  const item = element("li", { class: message.role });
  const reasoning = element("details", { class: "reasoning" }, element("summary", {}, "Reasoning"), element("div"));
  const text = element("div", { class: "text" });
  const calls = element("div");
  const foot = element("div", { class: "counts" });
  if (message.role === "assistant") item.append(reasoning, text, calls, foot);
  else item.append(text);
  let touched = false;
  reasoning.querySelector("summary").addEventListener("click", () => { touched = true; });
  const update = () => {
    const follow = $("messages").scrollHeight - $("messages").scrollTop - $("messages").clientHeight < 80;
    const writing = state.running && message === state.messages.at(-1);
    reasoning.hidden = !message.reasoning_content;
    reasoning.lastElementChild.textContent = message.reasoning_content ?? "";
    if (!touched) reasoning.open = Boolean(writing && !message.content && !message.tool_calls);
    text.replaceChildren(...(message.role === "assistant" ? richText(message.content) : [message.content]));
    item.classList.toggle("cursor", Boolean(writing));
    if (message.role === "assistant") {
      const results = new Map(state.messages.filter((m) => m.role === "tool").map((m) => [m.tool_call_id, m.content]));
      calls.replaceChildren(...(message.tool_calls ?? []).filter(Boolean).map((call) => toolCard(call, results)));
      foot.replaceChildren(counts(message));
      if (message.problem) {
        const again = element("button", { onclick: () => retry(message) }, "Try again");
        foot.replaceChildren(element("div", { class: "problem", role: "alert" }, message.problem, " ", again));
      }
    }
    if (follow) $("messages").scrollTop = $("messages").scrollHeight;
  };
  $("messages").append(item);
  update();
  $("messages").scrollTop = $("messages").scrollHeight;
  return { update };
}

function retry(message) {
  if (state.running) return;
  state.messages = state.messages.slice(0, state.messages.indexOf(message));
  render();
  answer();
}

function render() {
  $("messages").replaceChildren();
  state.messages.forEach(show);
}

function busy(on) {
  $("stop").hidden = !on;
  $("send").hidden = on;
  $("new").disabled = on;
}

// ---- documents ------------------------------------------------------------------------------

function showDocuments() {
  $("documents").replaceChildren(...state.documents.map((d, i) => element("li", {}, `${d.name} · ${d.text.length.toLocaleString()} characters`,
    element("button", { type: "button", "aria-label": `Remove ${d.name}`, onclick: () => { state.documents.splice(i, 1); showDocuments(); } }, "×"))));
}

async function addFiles(files) {
  for (const file of [...files]) { // a copy: the list empties when the picker is reset
    const bytes = await file.arrayBuffer();
    try {
      const text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
      state.documents.push({ name: file.name, text });
    } catch {
      notice(`${file.name} is not text in UTF-8, so it was not attached.`);
    }
  }
  showDocuments();
  $("input").focus();
}

// ---- the engine's charts --------------------------------------------------------------------

const series = { tokens: [[], []], batch: [[], []], cache: [[], []] };
let previous = null;

function draw(id, lines) {
  const svg = $(id);
  const top = Math.max(1, ...lines.flat()) * 1.1;
  svg.setAttribute("viewBox", `0 0 ${HISTORY} 100`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.replaceChildren(...lines.map((line, i) => {
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    const points = line.map((v, x) => `${x + HISTORY - line.length} ${98 - (v / top) * 94}`);
    path.setAttribute("d", points.length ? `M${points.join("L")}` : "");
    path.setAttribute("class", i ? "second" : "first");
    return path;
  }));
}

function push(name, ...values) {
  values.forEach((value, i) => {
    series[name][i].push(value);
    if (series[name][i].length > HISTORY) series[name][i].shift();
  });
  draw(`chart-${name}`, series[name]);
}

const bytes = (n) => n < 1024 ? `${n} B` : n < 2 ** 20 ? `${(n / 1024).toFixed(1)} KiB` : n < 2 ** 30 ? `${(n / 2 ** 20).toFixed(1)} MiB` : `${(n / 2 ** 30).toFixed(2)} GiB`;

function chart(stats) {
  const now = performance.now();
  if (previous) {
    const seconds = (now - previous.at) / 1000;
    const rate = (name) => Math.max(0, stats[name] - previous.stats[name]) / seconds;
    push("tokens", rate("completion_tokens"), rate("prompt_tokens"));
    $("now-tokens").textContent = `${rate("completion_tokens").toFixed(0)} out, ${rate("prompt_tokens").toFixed(0)} in`;
  }
  previous = { at: now, stats };
  push("batch", stats.num_running, stats.num_waiting);
  push("cache", stats.cache_bytes, 0);
  $("now-batch").textContent = `${stats.num_running} running, ${stats.num_waiting} waiting`;
  $("now-cache").textContent = bytes(stats.cache_bytes);
  const total = stats.cached_tokens + stats.prompt_tokens;
  const rows = [["Prompt tokens computed", stats.prompt_tokens], ["Prompt tokens from cache", stats.cached_tokens],
    ["Cache hit rate", total ? `${(100 * stats.cached_tokens / total).toFixed(1)} %` : "none yet"],
    ["Tokens generated", stats.completion_tokens],
    ...Object.entries(stats.finished).map(([reason, n]) => [`Ended: ${reason}`, n])];
  $("totals").tBodies[0].replaceChildren(...rows.map(([name, value]) =>
    element("tr", {}, element("td", {}, name), element("td", {}, value.toLocaleString()))));
}

async function watch() {
  for (;;) {
    try {
      chart(await getJSON("console/stats"));
      $("health").className = "up";
      $("health").lastElementChild.textContent = "ready";
      if (!$("model").options.length) await loadModels();
    } catch (error) {
      previous = null;
      $("health").className = "down";
      $("health").lastElementChild.textContent =
        error.message === "401" || error.message === "403" ? "needs an API key (Settings)" : "not reachable, retrying";
    }
    await new Promise((done) => setTimeout(done, document.hidden ? 5000 : 1000));
  }
}

async function loadModels() {
  const { data } = await getJSON("v1/models");
  const chosen = state.settings.model;
  $("model").replaceChildren(...data.map((m) => element("option", { value: m.id, title: m.description ?? "" }, m.id)));
  if (data.some((m) => m.id === chosen)) $("model").value = chosen;
  const { example } = await getJSON("console/example");
  $("try-example").hidden = !example;
  $("try-example").onclick = () => { $("input").value = example; $("input").focus(); };
  $("try-tool").hidden = false;
}

// ---- controls -------------------------------------------------------------------------------

const SAMPLE_TOOL = [{ type: "function", function: { name: "get_weather", description: "Get the current weather of a city.",
  parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] } } }];

function bind(id, read, write) {
  write($(id));
  $(id).addEventListener("input", () => { read($(id)); save(); });
}

function setTheme() {
  const theme = state.settings.theme;
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Theme: ${theme}`;
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("input").value.trim();
  if (state.running || (!text && !state.documents.length)) return;
  $("input").value = "";
  send(text);
});
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && !$("settings").open) state.running?.abort(); });
$("stop").onclick = () => state.running?.abort();
$("new").onclick = () => { state.messages = []; render(); save(); $("input").focus(); };
$("open-settings").onclick = () => $("settings").showModal();
$("theme").onclick = () => {
  const order = ["auto", "light", "dark"];
  state.settings.theme = order[(order.indexOf(state.settings.theme) + 1) % 3];
  setTheme();
  save();
};
$("toggle-tools").onclick = () => {
  $("tools-pane").hidden = !$("tools-pane").hidden;
  $("toggle-tools").setAttribute("aria-expanded", String(!$("tools-pane").hidden));
};
$("try-tool").onclick = () => {
  state.settings.tools = $("tools").value = JSON.stringify(SAMPLE_TOOL, null, 2);
  $("tools-pane").hidden = false;
  $("toggle-tools").setAttribute("aria-expanded", "true");
  $("input").value = "What is the weather in Paris?";
  $("input").focus();
  save();
};
$("attach").addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); $("files").click(); } });
$("files").addEventListener("change", () => { addFiles($("files").files); $("files").value = ""; });
for (const kind of ["dragenter", "dragover"]) document.addEventListener(kind, (event) => { event.preventDefault(); $("composer").classList.add("over"); });
for (const kind of ["dragleave", "drop"]) document.addEventListener(kind, (event) => { event.preventDefault(); $("composer").classList.remove("over"); });
document.addEventListener("drop", (event) => addFiles(event.dataTransfer.files));
document.querySelectorAll("[name=mode]").forEach((radio) => {
  radio.checked = radio.value === state.settings.mode;
  radio.addEventListener("change", () => { state.settings.mode = radio.value; save(); });
});
$("model").addEventListener("change", () => { state.settings.model = $("model").value; save(); });
bind("key", (n) => { state.settings.key = n.value; }, (n) => { n.value = state.settings.key; });
bind("system", (n) => { state.settings.system = n.value; }, (n) => { n.value = state.settings.system; });
bind("max-tokens", (n) => { state.settings.maxTokens = n.value; }, (n) => { n.value = state.settings.maxTokens; });
bind("temperature", (n) => { state.settings.temperature = n.value; }, (n) => { n.value = state.settings.temperature; });
bind("tools", (n) => { state.settings.tools = n.value; }, (n) => { n.value = state.settings.tools; });
for (const part of ["hit", "miss", "output"]) {
  bind(`price-${part}`, (n) => { state.settings.prices[part] = Number(n.value); }, (n) => { n.value = state.settings.prices[part]; });
}
setTheme();
render();
watch();
$("input").focus();
