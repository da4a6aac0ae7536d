// Keeps a page true while it is open: what the server says goes into its places, nothing moves.
//
// Every element with data-said or data-part is a place.  Once a second `/dashboard/events` brings
// what each says now; only what has changed is touched.  When the server is away the page says
// since when, and tries again by itself; a hidden tab closes its connection.
"use strict";

(() => {
  const link = document.getElementById("link");
  const RETRY_MS = 2000, LATE_MS = 6000;
  let source = null, heard_ms = 0, lost_ms = 0, retry = null;

  function write(places, values, put) {
    for (const place of places) {
      const value = values[place.dataset.said ?? place.dataset.part];
      if (value !== undefined) put(place, value);
    }
  }

  function say(place, [text, exact]) {
    if (place.textContent !== text) place.textContent = text;
    if (exact !== (place.getAttribute("title") ?? "")) {
      if (exact) place.setAttribute("title", exact); else place.removeAttribute("title");
    }
  }

  function show(view) {
    write(document.querySelectorAll("[data-said]"), view.said, say);
    write(document.querySelectorAll("[data-part]"), view.parts, (place, part) => {
      if (place.dataset.shown !== part) { place.dataset.shown = part; place.innerHTML = part; }
    });
    document.dispatchEvent(new CustomEvent("tierline:view", { detail: view }));
    if (window.htmx) window.htmx.trigger(document.body, "tick");
  }

  function tell() {
    const now = Date.now();
    if (source === null && retry === null) return;
    if (heard_ms && now - heard_ms < LATE_MS && source?.readyState === EventSource.OPEN) {
      link.className = "link";
      link.textContent = `● live, ${new Date(heard_ms).toLocaleTimeString([], { hour12: false })}`;
    } else if (heard_ms || lost_ms) {
      const since = new Date(heard_ms || lost_ms).toLocaleTimeString([], { hour12: false });
      link.className = "link lost";
      link.textContent = `✗ no answer since ${since}; trying every ${RETRY_MS / 1000} s`;
    }
  }

  function connect() {
    retry = null;
    if (source !== null || document.hidden) return;
    source = new EventSource("/dashboard/events");
    source.addEventListener("now", (event) => {
      heard_ms = Date.now();
      show(JSON.parse(event.data));
      tell();
    });
    source.onerror = () => {
      lost_ms ||= Date.now();
      close();
      retry = setTimeout(connect, RETRY_MS);
      tell();
    };
  }

  function close() {
    if (source !== null) source.close();
    source = null;
    if (retry !== null) clearTimeout(retry);
    retry = null;
  }

  document.addEventListener("visibilitychange", () => document.hidden ? close() : connect());
  addEventListener("pagehide", close);
  addEventListener("pageshow", connect);
  setInterval(tell, 1000);

  // Instants that the server wrote as UTC, in the reader's own zone.
  function localize(root) {
    for (const time of root.querySelectorAll("time[datetime]")) {
      const at = new Date(time.getAttribute("datetime"));
      time.textContent = at.toLocaleTimeString([], { hour12: false });
      time.title = at.toString();
    }
  }
  localize(document);
  document.addEventListener("htmx:afterSettle", (event) => localize(event.detail.elt));
  connect();
})();
