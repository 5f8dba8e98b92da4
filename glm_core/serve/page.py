"""The web page of the server: one file that chats over the server's own API."""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>glm-core</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 0 auto; padding: 1rem;
         color: #000; background: #fff; }
  #talk div { margin: .6rem 0; padding: .5rem .8rem; white-space: pre-wrap;
              overflow-wrap: anywhere; }
  .user { background: #eef3fa; }
  .assistant { border-left: 3px solid #0b5cad; }
  .lost { opacity: .5; }
  .error { color: #b00020; }
  form { display: flex; gap: .5rem; position: sticky; bottom: 0; background: #fff;
         padding: .5rem 0; }
  textarea { flex: 1; font: inherit; }
  details { color: #444; }
  input { font: inherit; width: 6rem; }
</style>
<h1>glm-core</h1>
<p><select id="model" aria-label="Model"></select></p>
<details><summary>Settings</summary>
  <label>temperature <input id="temperature" type="number" value="0.95" min="0" max="2"
    step="0.05"></label>
  <label>top-p <input id="top_p" type="number" value="0.7" min="0.05" max="1" step="0.05"></label>
  <label>API key <input id="key" type="password"></label>
</details>
<div id="talk" aria-live="polite"></div>
<form id="form">
  <textarea id="question" rows="2" aria-label="Your message" required></textarea>
  <button id="send">Send</button>
  <button id="stop" type="button" disabled>Stop</button>
</form>
<script>
"use strict";
const get = id => document.getElementById(id);
const messages = [];
let abort = null;  // of the reply under way

const headers = () => {
  const key = get("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: "Bearer " + key } : {}) };
};

const show = (kind, text) => {
  const box = document.createElement("div");
  box.className = kind;
  box.textContent = text;
  get("talk").append(box);
  box.scrollIntoView();
  return box;
};

const gone = error => {
  if (error.name === "AbortError") throw error;
  throw new Error("the server does not answer; see that it runs, then send again");
};

async function request(path, more) {
  const response = await fetch(path, { headers: headers(), signal: abort && abort.signal, ...more })
    .catch(gone);
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw new Error(body.error ? body.error.message : "the server answered " + response.status);
}

async function connect() {
  const body = await (await request("/v1/models")).json();
  get("model").replaceChildren(...body.data.map(model => new Option(model.id)));
}

async function ask(box) {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    body: JSON.stringify({ model: get("model").value, messages, stream: true,
      temperature: Number(get("temperature").value), top_p: Number(get("top_p").value) }),
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let left = ""; ;) {
    const { done, value } = await reader.read().catch(gone);
    if (done) throw new Error("the reply broke off; send again");
    const lines = (left + value).split("\\n\\n");
    left = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      const part = JSON.parse(line.slice(6));
      if (part.error) throw new Error(part.error.message);
      box.textContent += part.choices[0].delta.content ?? "";
    }
  }
}

const busy = on => {
  abort = on ? new AbortController() : null;
  get("send").disabled = on;
  get("stop").disabled = !on;
};

async function send(question) {
  busy(true);
  messages.push({ role: "user", content: question });
  const asked = show("user", question), box = show("assistant", "");
  let state = "answered";
  try {
    if (!get("model").value) await connect();
    await ask(box);
  } catch (error) {
    state = error.name === "AbortError" ? "stopped" : "failed";
    if (state === "failed") show("error", error.message);
  }
  if (!box.textContent) box.remove();
  if (state === "answered" || (state === "stopped" && box.textContent))
    messages.push({ role: "assistant", content: box.textContent });
  else {  // the model has not seen this question
    messages.pop();
    for (const part of [asked, box]) part.classList.add("lost");
    if (!get("question").value) get("question").value = question;
  }
  busy(false);
  document.body.dataset.state = state;
}

get("form").addEventListener("submit", event => {
  event.preventDefault();
  const question = get("question").value.trim();
  if (abort || !question) return;  // one question at a time
  get("question").value = "";
  send(question);
});
get("question").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    get("form").requestSubmit();
  }
});
get("stop").addEventListener("click", () => abort && abort.abort());
const question = new URLSearchParams(location.search).get("q");
if (question) send(question);
else connect().catch(() => {});  // a key may be missing yet; a question shows it
</script>
</html>
"""
