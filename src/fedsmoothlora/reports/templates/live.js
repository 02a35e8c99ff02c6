"use strict";
// Replaces the parts of the page that the server sends, and says whether the connection stands.

const connection = document.getElementById("connection");

function say(state, text) {
  connection.dataset.state = state;
  connection.textContent = text;
}

// Opened details and checked boxes stay as the reader left them.
function replace(part, text) {
  const open = [...part.querySelectorAll("details")].map(one => one.open);
  const checked = new Set([...part.querySelectorAll("input:checked")].map(one => one.value));
  part.innerHTML = text; // The server has escaped every text in it.
  part.querySelectorAll("details").forEach((one, place) => { one.open = Boolean(open[place]); });
  part.querySelectorAll("input").forEach(one => { one.checked = checked.has(one.value); });
}

const source = new EventSource(document.body.dataset.events);
source.addEventListener("open", () => say("live", "This page follows the run."));
source.addEventListener("error", () => say("lost", "The connection is lost. Trying again."));
source.addEventListener("parts", event => {
  say("live", "This page follows the run.");
  for (const [id, text] of Object.entries(JSON.parse(event.data))) {
    const part = document.getElementById(`part-${id}`);
    if (part) replace(part, text);
  }
});
