// The Pools page: polls Flower for the numbers of all workers and shows them.

import { age, plural } from "./numbers.js";
import { alertsOf, byId, View } from "./view.js";

const VERSION = 1;
const INTERVAL = 5000;
// While the servers are asked.
const SHORT_INTERVAL = 1000;
// A Flower that is down is polled less often.
const LONGEST_INTERVAL = 30000;
const TIMEOUT = 15000;

const root = byId("workerpools");
const view = new View(root);
const url = new URL(root.dataset.url, location.href);
// The page's URL may contain a user and password. A relative URL inherits them, and browsers refuse to fetch it.
url.username = url.password = "";

let paused = root.dataset.refreshes !== "1";
let failure = "";
let failures = 0;
let fetched = null;
let timer = null;
let running = false;
// Someone wants the servers asked.
let wanted = false;
let drawServers = () => {};

/** Fetches the document once, with POST after the servers were asked; throws an Error with a message for display. */
async function ask(method) {
    // As Flower's own script does.
    const token = /(?:^|; )_xsrf=([^;]*)/.exec(document.cookie);
    const headers = method === "POST" && token ? { "X-XSRFToken": decodeURIComponent(token[1]) } : {};
    let response;
    try {
        response = await fetch(url, { method, headers, cache: "no-store", signal: AbortSignal.timeout(TIMEOUT) });
    } catch {
        throw new Error("Flower does not respond.");
    }
    if (response.status === 401 || response.status === 403) {
        const told = await response.json().catch(() => ({}));
        throw new Error(told.hint || "Flower requires a login: reload this page.");
    }
    if (!response.ok) {
        throw new Error(`Flower returned an error (status ${response.status}).`);
    }
    let found;
    try {
        found = await response.json();
    } catch {
        throw new Error("Flower's response cannot be read: reload this page.");
    }
    if (found.version !== VERSION) {
        throw new Error("Flower has a different version of this page: reload it.");
    }
    return found;
}

async function refresh() {
    if (running) {
        return;
    }
    running = true;
    clearTimeout(timer);
    const method = wanted ? "POST" : "GET";
    try {
        const found = await ask(method);
        [failure, failures, fetched] = ["", 0, performance.now()];
        view.update(found);
    } catch (error) {
        failure = error.message;
        failures += 1;
    } finally {
        running = false;
        wanted = wanted && method === "GET";
    }
    drawState();
    if (wanted) {
        refresh();
    } else {
        schedule();
    }
}

function schedule() {
    clearTimeout(timer);
    if (view.document?.servers.asking && !failure) {
        timer = setTimeout(refresh, SHORT_INTERVAL);
    // A page in the background is refreshed when it becomes visible.
    } else if (!paused && !document.hidden) {
        timer = setTimeout(refresh, Math.min(LONGEST_INTERVAL, INTERVAL * 2 ** Math.max(0, failures - 1)));
    }
}

function drawState() {
    const found = view.document;
    const problem = failure || (found && found.problem) || "";
    const old = dataAge();
    drawServers(found, wanted, since);
    const aged = old === null ? "" : ` These numbers are ${age(old)} old.`;
    setText("wp-problem", problem && problem + aged);
    byId("wp-problem").hidden = !problem;
    setText("wp-refreshed", stateText(problem, old));
    byId("wp-dot").classList.toggle("status-dot-live", !problem && !paused && found !== null);
    byId("wp-dot").classList.toggle("status-dot-error", Boolean(problem));
    setText("wp-pause", paused ? "Resume" : "Pause");
    byId("wp-pause").title = paused ? "Refresh this page automatically" : "Stop refreshing this page automatically";
    // For screen readers: announced only when it changes. The numbers change constantly and are not announced.
    const alerts = found ? alertsOf(found.workers).length : 0;
    setText("wp-said", [problem, alerts && plural(alerts, "alert")].filter(Boolean).join(" "));
}

function stateText(problem, old) {
    if (old === null) {
        return problem ? "No data" : "Querying the workers…";
    }
    if (problem) {
        return `Not refreshed, ${age(old)} old`;
    }
    return paused ? `Paused, ${age(old)} old` : `Updated ${age(old)} ago`;
}

/** Returns the age of the numbers shown, in seconds; null while there are none. */
function dataAge() {
    const found = view.document;
    return found === null || found.asked === null ? null : since(found.asked);
}

/** Returns the age of a moment of Flower's clock, in seconds. */
function since(moment) {
    return Math.max(0, view.document.now - moment) + (performance.now() - fetched) / 1000;
}

function setText(id, content) {
    if (byId(id).textContent !== content) {
        byId(id).textContent = content;
    }
}

byId("wp-pause").addEventListener("click", () => {
    paused = !paused;
    if (paused) {
        clearTimeout(timer);
    } else {
        refresh();
    }
    drawState();
});
byId("wp-ask").addEventListener("click", () => {
    wanted = true;
    drawState();
    refresh();
});
document.addEventListener("visibilitychange", () => {
    if (document.hidden || paused) {
        clearTimeout(timer);
    } else {
        refresh();
    }
});
setInterval(drawState, 1000);
drawState();
refresh();
// The numbers do not wait for it.
({ drawServers } = await import("./servers.js"));
drawState();
