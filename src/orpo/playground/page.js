"use strict";
// Everything that a model, a person or a file says is put into the page as text (textContent); nothing is ever read as HTML.

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "seed", "max_new_tokens"];
const ENDINGS = {
  length: "cut at the most tokens",
  stopped: "stopped",
};

let facts = null; // what the server says of models and files
let state = { messages: [], answers: [], better: null, rows: null, talk: [] };
let isWriting = false;
let isEditing = false;

// A reload keeps the conversation, another tab has one of its own.
function talkName() {
  let name = sessionStorage.getItem("talk");
  if (!name) {
    name = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
    sessionStorage.setItem("talk", name);
  }
  return name;
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function textOf(content) {
  const made = element("div", "text", content);
  made.dir = "auto";
  return made;
}

function button(text, act, label) {
  const made = element("button", "", text);
  made.type = "button";
  if (label) made.setAttribute("aria-label", label);
  made.addEventListener("click", act);
  return made;
}

function settings() {
  const found = {};
  for (const name of NUMBERS) found[name] = $(name).value === "" ? null : Number($(name).value);
  found.system = $("system").value.trim() === "" ? null : $("system").value;
  return found;
}

function say(text, problem) {
  $("said").textContent = text || "";
  $("problem").textContent = problem || "";
}

const request = (wish) =>
  fetch("talk", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ talk: talkName(), ...wish }),
  });

async function act(wish) {
  say();
  let answer;
  try {
    const response = await request(wish);
    answer = response.status === 403 ? { error: await response.text() } : await response.json();
  } catch {
    answer = { error: "the chat has ended: start it again where it was started" };
  }
  if (answer.state) state = answer.state;
  if (answer.error) say("", answer.error);
  show();
  return !answer.error;
}

// ---- answers that come while they are written

async function* linesOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

async function write(wish, question) {
  isWriting = true;
  say("The models are writing …");
  show(question);
  // Answers to the same question stay where they are; a new question begins with empty columns.
  const first = wish.do === "retry" ? state.answers.length : 0;
  if (!first) $("answers").replaceChildren();
  const places = facts.sides.map((side, number) => card({ number: first + number + 1, side, text: "" }, false));
  $("answers").append(...places);
  let end = null;
  try {
    const response = await request({ ...wish, settings: settings() });
    if (!response.ok) {
      end = { error: response.status === 403 ? await response.text() : (await response.json()).error };
    } else {
      for await (const line of linesOf(response)) {
        if (line.state) end = line;
        else follow(() => { places[line.side].querySelector(".text").textContent = line.text; });
      }
    }
  } catch {
    end = null;
  }
  isWriting = false;
  if (end && end.state) state = end.state;
  say("", end ? end.error : "the chat has ended: start it again where it was started");
  show();
  return Boolean(end && !end.error);
}

// The page goes along with what is written, unless the reader has scrolled up.
function follow(change) {
  const page = document.documentElement;
  const isAtEnd = page.scrollHeight - window.scrollY - window.innerHeight < 160;
  change();
  if (isAtEnd) window.scrollTo(0, page.scrollHeight);
}

// ---- what is shown

function card(answer, hasChoice) {
  const made = element("article", "answer" + (answer.number === state.better ? " better" : ""));
  made.append(element("b", "", `[${answer.number}] ${answer.side}`), textOf(answer.text.trim()));
  const facts = [answer.num_tokens ? `${answer.num_tokens} tokens` : "", ENDINGS[answer.finish] || ""].filter(Boolean);
  made.append(element("p", "soft", facts.join(", ")));
  if (hasChoice) made.append(choices(answer));
  return made;
}

function choices(answer) {
  const row = element("div", "row");
  if (state.better !== null) {
    if (answer.number === state.better) row.append(element("span", "", `Better: row ${state.rows} of the file`), button("Undo", () => act({ do: "undo" })));
    return row;
  }
  const others = state.answers.filter((other) => other.number !== answer.number);
  for (const other of others) {
    const isSame = other.text.trim() === answer.text.trim() || !other.text.trim() || !answer.text.trim();
    const text = others.length === 1 ? "This one is better" : `Better than ${other.number}`;
    const made = button(text, () => prefer(answer.number, other.number), `Answer ${answer.number} is better than answer ${other.number}`);
    made.disabled = isSame || isWriting;
    if (isSame) made.title = "The two are the same, or one is empty: there is nothing to learn from them.";
    row.append(made);
  }
  return row;
}

async function prefer(number, over) {
  if (await act({ do: "better", number, over })) say(`${state.rows} rows in ${facts.preferences}. The conversation goes on with answer ${number}.`);
}

function show(question) {
  const messages = question === undefined ? state.messages : isEditing ? [...state.messages.slice(0, -1), question] : [...state.talk, question];
  $("turns").replaceChildren(
    ...messages.map(({ role, content }) => {
      const turn = element("article", `turn ${role}`);
      turn.append(element("b", "", { user: "You", assistant: "Answer", system: "System message" }[role] || role), textOf(content));
      return turn;
    }),
  );
  const hasChoice = state.answers.length > 1;
  if (question === undefined) $("answers").replaceChildren(...state.answers.map((answer) => card(answer, hasChoice)));
  $("answers").style.setProperty("--columns", Math.min(2, Math.max(facts.sides.length, state.answers.length)));
  const hasTurn = state.messages.some((message) => message.role === "user");
  for (const id of ["retry", "edit", "back", "save"]) $(id).disabled = isWriting || !hasTurn;
  for (const id of ["send", "reset"]) $(id).disabled = isWriting;
  $("stop").hidden = !isWriting;
  $("send").textContent = isEditing ? "Ask it in these words" : "Send";
  $("edit").textContent = isEditing ? "Do not edit" : "Edit the question";
  noteSystem();
}

function noteSystem() {
  const said = state.messages.find((message) => message.role === "system");
  const isOther = ($("system").value.trim() || "") !== (said ? said.content.trim() : "");
  $("system-note").hidden = !(isOther && state.messages.some((message) => message.role === "user"));
}

// The guideline is Markdown of which headings, items and bold words are shown as such.
function showGuideline(text) {
  const blocks = [];
  for (const line of text.replaceAll("\r\n", "\n").split("\n")) {
    const trimmed = line.trim();
    const last = blocks[blocks.length - 1];
    const item = trimmed.match(/^(?:[-*]|\d+[.)])\s/);
    if (!trimmed) blocks.push(null);
    else if (/^#+\s/.test(trimmed)) blocks.push({ tag: "h2", text: trimmed.replace(/^#+\s+/, "") }, null);
    else if (item || !last) blocks.push({ tag: "p", className: item ? "item" : "", text: trimmed });
    else last.text += (trimmed.startsWith("|") ? "\n" : " ") + trimmed;
  }
  $("guideline").replaceChildren(
    ...blocks.filter(Boolean).map((block) => {
      const made = element(block.tag, block.className);
      block.text.split("**").forEach((piece, number) => made.append(number % 2 ? element("strong", "", piece) : piece));
      return made;
    }),
  );
}

// ---- what people do

async function send() {
  const text = $("question").value;
  if (!facts || isWriting || !text.trim()) return;
  const wish = { do: isEditing ? "edit" : "ask", text };
  const isDone = await (($("question").value = ""), write(wish, { role: "user", content: text }));
  if (!isDone && !$("question").value) $("question").value = text; // nothing that was typed is lost
  else isEditing = false;
  show();
  $("question").focus();
}

function startEditing() {
  isEditing = !isEditing;
  const last = state.messages[state.messages.length - 1];
  $("question").value = isEditing && last ? last.content : "";
  show();
  $("question").focus();
}

function save() {
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify({ messages: state.talk }) + "\n"], { type: "application/json" }));
  link.download = "conversation.jsonl";
  link.click();
  URL.revokeObjectURL(link.href);
}

async function start() {
  listen();
  const response = await fetch("facts");
  if (!response.ok) return say("", await response.text());
  facts = await response.json();
  $("title").textContent = facts.title;
  $("preferences").textContent = facts.preferences;
  showGuideline(facts.guideline);
  for (const name of NUMBERS) $(name).value = facts.settings[name];
  $("system").value = facts.settings.system || "";
  if (window.matchMedia("(max-width: 860px)").matches) for (const id of ["guide", "options"]) $(id).open = false;
  // A page that was closed while an answer was written has broken it off: that may take until the next token.
  for (let tries = 0; tries < 50 && !(await act({ do: "look" })); tries++) await new Promise((wake) => setTimeout(wake, 200));
}

function listen() {
  $("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  $("stop").addEventListener("click", () => request({ do: "stop" }));
  $("retry").addEventListener("click", () => write({ do: "retry" }));
  $("edit").addEventListener("click", startEditing);
  $("back").addEventListener("click", () => { isEditing = false; act({ do: "back" }); });
  $("reset").addEventListener("click", () => { isEditing = false; act({ do: "reset", settings: settings() }); });
  $("save").addEventListener("click", save);
  $("system").addEventListener("input", noteSystem);
}

start();
