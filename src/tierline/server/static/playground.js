// A conversation over the same address that everybody's client uses, with what a page can add:
// every token's probability, a stop button, and a link to what the server did for each answer.
//
// The key stays in its field and the conversation in this page; nothing is kept.
"use strict";

(() => {
  const form = document.getElementById("ask");
  if (!form) return;
  const talk = document.getElementById("talk"), shown = document.getElementById("token");
  const send = document.getElementById("send"), stop = document.getElementById("stop");
  const status = document.getElementById("status");
  const messages = [];
  let aborting = null;

  const field = (name) => form.elements[name];
  const number = (name) => field(name).value.trim() === "" ? undefined : Number(field(name).value);

  function element(name, className, text) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function body() {
    const asked = {
      model: form.dataset.model, stream: true, stream_options: { include_usage: true },
      messages: [...system(), ...messages],
      temperature: number("temperature"), top_p: number("top_p"), top_k: number("top_k"),
      min_p: number("min_p"), seed: number("seed"), max_tokens: number("max_tokens"),
      frequency_penalty: number("frequency_penalty"),
    };
    if (field("slo").value) asked.slo = field("slo").value;
    if (field("stop").value) asked.stop = field("stop").value.split("\n").filter(Boolean);
    if (field("logprobs").checked) Object.assign(asked, { logprobs: true, top_logprobs: 5 });
    const schema = field("schema").value.trim();
    if (schema) asked.response_format = {
      type: "json_schema", json_schema: { name: "answer", strict: true, schema: JSON.parse(schema) },
    };
    return asked;
  }

  function system() {
    const content = field("system").value.trim();
    return content ? [{ role: "system", content }] : [];
  }

  function turn(role, text) {
    const box = element("article", `turn ${role}`);
    box.append(element("h3", "", role === "user" ? "You" : form.dataset.model));
    const words = element("div", "words", text);
    box.append(words);
    talk.append(box);
    return { box, words };
  }

  // One token as a place that tells its probability; its text comes from its bytes, since a
  // character may be cut between two tokens.
  function token(entry, decoder) {
    const place = element("span", `t p${Math.min(4, Math.floor(Math.exp(entry.logprob) * 5))}`,
      decoder.decode(new Uint8Array(entry.bytes ?? []), { stream: true }));
    place.entry = entry;
    return place;
  }

  const percent = (logprob) => `${(100 * Math.exp(logprob)).toPrecision(3)} %`;
  const quoted = (text) => JSON.stringify(text).replaceAll("\\\\", "\\");

  function tell(place) {
    talk.querySelectorAll(".t.on").forEach((t) => t.classList.remove("on"));
    place.classList.add("on");
    const { entry } = place;
    const table = element("table"), rows = element("tbody");
    const caption = element("caption", "", `${quoted(entry.token)} had ${percent(entry.logprob)}`);
    for (const top of entry.top_logprobs ?? []) {
      const row = element("tr", top.token === entry.token ? "taken" : "");
      const meter = element("meter");
      Object.assign(meter, { min: 0, max: 1, value: Math.exp(top.logprob) });
      meter.setAttribute("aria-hidden", "true");
      const bar = element("td");
      bar.append(meter);
      const name = element("th", "", quoted(top.token));
      name.scope = "row";
      row.append(name, element("td", "num", percent(top.logprob)), bar,
        element("td", "", top.token === entry.token ? "taken" : ""));
      rows.append(row);
    }
    table.append(caption, rows);
    shown.replaceChildren(table);
  }

  function watch(words) {
    words.addEventListener("mouseover", ({ target }) => { if (target.entry) tell(target); });
    words.addEventListener("click", ({ target }) => { if (target.entry) tell(target); });
    words.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const places = [...words.querySelectorAll(".t")];
      if (!step || !places.length) return;
      event.preventDefault();
      const at = places.findIndex((place) => place.classList.contains("on"));
      tell(places[Math.min(Math.max(at + step, 0), places.length - 1)]);
    });
  }

  // Server-sent events of a response, parsed as they come.
  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").filter((l) => l.startsWith("data:")).map((l) => l.slice(5).trim()).join("");
        if (data && data !== "[DONE]") yield JSON.parse(data);
      }
    }
  }

  async function refused(response) {
    const { error } = await response.json().catch(() => ({ error: null }));
    const told = error ? `${error.message}${error.param ? ` (${error.param})` : ""}${error.hint ? `: ${error.hint}` : ""}` : response.statusText;
    const again = response.headers.get("retry-after");
    return `${response.status}: ${told}${again ? `; try again in ${again} s` : ""}`;
  }

  async function answer(words, asked, began_ms) {
    const headers = { "content-type": "application/json" };
    if (field("key")?.value) headers.authorization = `Bearer ${field("key").value}`;
    const response = await fetch("/v1/chat/completions", {
      method: "POST", headers, body: JSON.stringify(asked), signal: aborting.signal,
    });
    if (!response.ok) throw new Error(await refused(response));
    const decoder = new TextDecoder(), found = { text: "", tokens: 0 };
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      found.id ??= event.id;
      found.usage = event.usage ?? found.usage;
      found.service = event.tierline ?? found.service;
      const choice = event.choices?.[0];
      if (!choice) continue;
      found.reason = choice.finish_reason ?? found.reason;
      const text = choice.delta?.content ?? "", entries = choice.logprobs?.content ?? [];
      if (text || entries.length) found.first_ms ??= performance.now() - began_ms;
      found.text += text;
      found.tokens += entries.length;
      if (entries.length) words.append(...entries.map((entry) => token(entry, decoder)));
      else if (text) words.append(text);
      status.textContent = `${found.tokens || found.text.length} ${found.tokens ? "tokens" : "characters"}, ${((performance.now() - began_ms) / 1000).toFixed(1)} s`;
    }
    return found;
  }

  const three = (value) => value === undefined || value === null ? "–" : Number(value.toPrecision(3));

  function sum(box, found, took_ms) {
    const line = element("p", "sum");
    const made = found.usage?.completion_tokens ?? found.tokens;
    const rest_s = (took_ms - (found.first_ms ?? took_ms)) / 1000;
    const rate = made > 1 && rest_s > 0 ? `, ${three((made - 1) / rest_s)} tokens/s after it` : "";
    const cached = found.usage?.prompt_tokens_details?.cached_tokens ?? 0;
    line.append(`${made} tokens (${found.reason ?? "cut off"}), the first after ${three(found.first_ms)} ms${rate}; `
      + `${found.usage?.prompt_tokens ?? "–"} in the prompt, ${cached} of them cached; `
      + `queued ${three(found.service?.queue_ms)} ms. `);
    if (found.id) {
      const link = element("a", "", "What the server did for it");
      link.href = `/dashboard/requests/${encodeURIComponent(found.id)}`;
      line.append(link);
    }
    box.append(line);
  }

  function busy(is) {
    send.disabled = is;
    stop.disabled = !is;
    talk.setAttribute("aria-busy", String(is));
  }

  async function ask() {
    const text = field("message").value.trim();
    if (!text) { field("message").focus(); return; }
    messages.push({ role: "user", content: text });
    let asked;
    try {
      asked = body();
    } catch (error) {
      messages.pop();
      status.textContent = `The JSON schema does not parse: ${error.message}`;
      field("schema").closest("details").open = true;
      field("schema").focus();
      return;
    }
    field("message").value = "";
    document.getElementById("talk-empty")?.remove();
    turn("user", text);
    const { box, words } = turn("assistant", "");
    Object.assign(words, { tabIndex: 0 });
    words.setAttribute("role", "group");
    words.setAttribute("aria-label", "Answer; arrow keys walk its tokens");
    watch(words);
    aborting = new AbortController();
    busy(true);
    const began_ms = performance.now();
    let found = null;
    try {
      found = await answer(words, asked, began_ms);
      status.textContent = "Done.";
    } catch (error) {
      const cut = error.name === "AbortError";
      box.append(element("p", "sum late", cut ? "Stopped; the server was told at once." : `✗ ${error.message}`));
      status.textContent = cut ? "Stopped." : "Refused.";
      if (!words.textContent) messages.pop();
    }
    const said = found?.text ?? words.textContent;
    if (said) messages.push({ role: "assistant", content: said });
    if (found) sum(box, found, performance.now() - began_ms);
    busy(false);
    field("message").focus();
  }

  form.addEventListener("submit", (event) => { event.preventDefault(); if (!send.disabled) ask(); });
  stop.addEventListener("click", () => aborting?.abort());
  field("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); form.requestSubmit(); }
  });
  document.getElementById("anew").addEventListener("click", () => {
    aborting?.abort();
    messages.length = 0;
    talk.replaceChildren();
    shown.replaceChildren();
    status.textContent = "A new conversation.";
    field("message").focus();
  });
  busy(false);
})();
