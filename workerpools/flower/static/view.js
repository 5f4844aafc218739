// Shows Flower's document: the summary, the alerts, and a table per worker, with a group of rows for all processes and
// one per process.

import {
    acquired, acquisitions, age, closings, count, History, longestWait, percent, plural, reuseRatio, seconds, sparkline,
    troubles, value,
} from "./numbers.js";

// The number of processes up to which they are shown without a click.
const FEW = 8;

// The utilisation from which a bar changes colour.
const HIGH = 0.8;

const STATUS = { online: "online", silent: "not responding", offline: "offline" };

// What the title of a number of open connections says, where servers count them.
const CEILING = "The pools of all worker processes";
const ASK = "Whether their servers have room for them is known when they are asked, below.";

export class View {
    constructor(root) {
        this.workerUrl = root.dataset.workerUrl;
        this.history = new History();
        this.taken = new Map();
        this.opened = new Map();
        this.document = null;
        byId("wp-filter").addEventListener("input", () => this.draw());
    }

    /** Shows a document in place of the previous one. */
    update(found) {
        const first = this.document === null;
        this.document = found;
        this.remember();
        this.draw();
        if (first && location.hash) {
            // The URL's target did not exist when the page loaded.
            const target = byId(decodeURIComponent(location.hash.slice(1)));
            if (target) {
                target.scrollIntoView();
            }
        }
    }

    remember() {
        const keys = new Set();
        for (const worker of this.document.workers) {
            const taken = worker.snapshots.map((snapshot) => snapshot.taken).join();
            const fresh = this.taken.get(worker.name) !== taken;
            this.taken.set(worker.name, taken);
            for (const group of groupsOf(worker, true)) {
                for (const resource of group.resources) {
                    const key = rowKey(worker, group, resource);
                    keys.add(key);
                    if (fresh && acquired(resource)) {
                        const [reused, opened] = acquisitions([resource]);
                        this.history.add(key, reused + opened, group.taken, group.started);
                    }
                }
            }
        }
        this.history.keep(keys);
    }

    draw() {
        if (this.document === null) {
            return;
        }
        const { workers, without } = this.document;
        const alerts = alertsOf(workers);
        this.drawSummary(workers.filter((worker) => worker.status !== "offline"), alerts);
        this.drawAlerts(alerts);
        const wanted = byId("wp-filter").value.trim().toLowerCase();
        show(byId("wp-filter-row"), workers.length > 1 || wanted !== "");
        const shown = workers.map((worker) => filtered(worker, wanted)).filter((worker) => worker !== null);
        keyed(byId("wp-workers"), shown.map((worker) => ({ ...worker, key: worker.name })), () => this.makeWorker(),
            (card, worker) => this.drawWorker(card, worker));
        this.drawEmpty(shown.length, wanted);
        show(byId("wp-budget"), shown.some(paysForReplays));
        show(byId("wp-without"), workers.length > 0 && without.length > 0);
        text(byId("wp-without"), `Without a WorkerPools: ${without.join(", ")}`);
    }

    drawSummary(workers, alerts) {
        const totals = workers.flatMap((worker) => worker.snapshots.flatMap((snapshot) => snapshot.totals));
        const sum = (name) => totals.reduce((before, each) => before + value(each, name), 0);
        const limited = totals.length > 0 && totals.every((each) => value(each, "limit"));
        const waits = totals.map(longestWait).filter((each) => each !== null);
        const [reused, opened] = acquisitions(totals);
        text(byId("wp-in-use"), limited ? `${count(sum("in_use"))} of ${count(sum("limit"))}` : count(sum("in_use")));
        const more = headRoom(workers);
        text(byId("wp-open"), `${count(sum("open"))} open, ${count(sum("idle"))} idle`
            + `${more === null ? "" : `, at most ${count(more)} more`}, ${count(sum("opened"))} opened since start`);
        attribute(byId("wp-open"), "title", more === null ? null : `${CEILING} have ${count(more)} left. ${ASK}`);
        text(byId("wp-pending"), count(sum("pending")));
        text(byId("wp-longest-wait"), `longest wait ever ${seconds(waits.length ? Math.max(...waits) : null)}`);
        text(byId("wp-reused"), percent(reuseRatio(reused, opened)));
        text(byId("wp-opened"), `of ${plural(reused + opened, "acquisition")}`);
        text(byId("wp-alert-count"), count(alerts.length));
        byId("wp-alert-card").classList.toggle("metric-card-danger", alerts.length > 0);
        const alarmed = new Set(alerts.map((alert) => alert.worker)).size;
        text(byId("wp-alert-workers"), `in ${count(alarmed)} of ${plural(workers.length, "worker")}`);
    }

    drawAlerts(alerts) {
        show(byId("wp-alerts"), alerts.length > 0);
        keyed(byId("wp-alert-list"), alerts, () => make("wp-alert"), (item, alert) => {
            text(part(item, "rule"), ruleText(alert));
            text(part(item, "message"), alert.message);
            text(part(item, "worker"), alert.worker);
            attribute(part(item, "worker"), "href", `#worker:${encodeURIComponent(alert.worker)}`);
            text(part(item, "where"), [
                alert.resource && `, ${alert.resource}`,
                alert.pid !== null && `, process ${alert.pid}`,
            ].filter(Boolean).join(""));
            const since = new Date(alert.since * 1000);
            text(part(item, "since"), since.toLocaleTimeString());
            attribute(part(item, "since"), "datetime", since.toISOString());
            attribute(part(item, "since"), "title", since.toLocaleString());
        });
    }

    makeWorker() {
        const card = make("wp-worker");
        part(card, "toggle").addEventListener("click", () => {
            this.opened.set(card.worker.name, !this.processesShown(card.worker));
            this.drawWorker(card, card.worker);
        });
        return card;
    }

    processesShown(worker) {
        return this.opened.get(worker.name) ?? processCount(worker) <= FEW;
    }

    drawWorker(card, worker) {
        card.worker = worker;
        attribute(card, "id", `worker:${worker.name}`);
        text(part(card, "name"), worker.name);
        if (this.workerUrl) {
            attribute(part(card, "name"), "href", this.workerUrl.replace(/0$/, () => encodeURIComponent(worker.name)));
        }
        const status = part(card, "status");
        text(status, STATUS[worker.status] || worker.status);
        attribute(status, "data-status", worker.status);
        text(part(card, "facts"), facts(worker).join(" · "));
        const note = notes(worker).join(" ");
        text(part(card, "note"), note);
        show(part(card, "note"), note !== "");

        const shown = this.processesShown(worker);
        const groups = worker.status === "offline" ? groupsOf(worker, false) : groupsOf(worker, shown);
        const toggle = part(card, "toggle");
        const children = worker.snapshots.some((snapshot) => snapshot.processes.some((each) => each.index !== null));
        show(toggle, children && worker.status !== "offline");
        attribute(toggle, "aria-expanded", String(shown));
        const processes = plural(processCount(worker), "process", "processes");
        text(toggle, `${shown ? "Hide" : "Show"} ${processes}`);
        attribute(toggle, "aria-label", `${shown ? "Hide" : "Show"} ${processes} of ${worker.name}`);

        show(part(card, "table"), groups.some((group) => group.resources.length));
        text(part(card, "caption"), `Connection pools of ${worker.name}`);
        fillTable(part(card, "table"), worker, groups, this.history, worker.snapshots.flatMap((each) => each.alerts));
    }

    drawEmpty(shown, wanted) {
        const { workers, without, asked, problem } = this.document;
        const [title, words] = emptiness(workers, without, asked, problem, wanted);
        show(byId("wp-empty"), shown === 0 && title !== "");
        text(byId("wp-empty-title"), title);
        text(byId("wp-empty-text"), words);
        show(byId("wp-metrics"), workers.length > 0);
    }
}

/** Returns every alert with its worker, oldest first. */
export function alertsOf(workers) {
    const found = workers
        .filter((worker) => worker.status !== "offline")
        .flatMap((worker) => worker.snapshots.flatMap((snapshot, n) => snapshot.alerts.map((alert) => ({
            ...alert,
            worker: worker.name,
            key: JSON.stringify([worker.name, n, alert.rule, alert.resource, alert.pid]),
        }))));
    return found.sort((one, other) => one.since - other.since);
}

function filtered(worker, wanted) {
    if (worker.name.toLowerCase().includes(wanted)) {
        return worker;
    }
    const matching = (resources) => resources.filter((each) => each.name.toLowerCase().includes(wanted));
    const snapshots = worker.snapshots.map((snapshot) => ({
        ...snapshot,
        totals: matching(snapshot.totals),
        processes: snapshot.processes.map((each) => ({ ...each, resources: matching(each.resources) })),
    }));
    return snapshots.some((snapshot) => snapshot.totals.length) ? { ...worker, snapshots } : null;
}

function processCount(worker) {
    return new Set(worker.snapshots.flatMap((snapshot) => snapshot.processes.map((each) => each.pid))).size;
}

function facts(worker) {
    const found = [];
    const [snapshot] = worker.snapshots;
    if (snapshot) {
        found.push(snapshot.execution_pool, plural(processCount(worker), "process", "processes"));
    }
    if (worker.age !== null && worker.status !== "online") {
        found.push(`last reply ${age(worker.age)} ago`);
    }
    return found.filter(Boolean);
}

function notes(worker) {
    const found = [];
    if (!worker.readable) {
        found.push("This worker's reply cannot be read: it runs a different version of workerpools.");
    } else if (worker.age === null) {
        found.push("This worker has not replied yet.");
    } else if (worker.status === "silent") {
        found.push("These are its last numbers. A worker cannot reply while it runs a task in its main process.");
    } else if (worker.status === "offline") {
        found.push("These are its last numbers.");
    } else if (worker.snapshots.every((snapshot) => !snapshot.totals.length)) {
        found.push("No resource is declared in this worker.");
    }
    const unseen = Math.max(0, ...worker.snapshots.map((snapshot) => snapshot.unseen));
    if (unseen && worker.status === "online") {
        found.push(`${plural(unseen, "child publishes", "children publish")} nothing: just starting, or no space in `
            + "shared memory.");
    }
    return found;
}

function emptiness(workers, without, asked, problem, wanted) {
    if (workers.length) {
        return ["No matches", `No worker or resource has “${wanted}” in its name.`];
    }
    if (without.length) {
        return [
            `${plural(without.length, "worker")} without connection pools`,
            `${without.join(", ")}: the app has no WorkerPools. Add pools = WorkerPools(app) to see its connections `
                + "here.",
        ];
    }
    if (problem) {
        return ["No worker is known", "This page keeps trying."];
    }
    return asked === null
        ? ["Querying the workers…", ""]
        : ["No worker has replied", "This page updates as soon as one does."];
}

/** Returns how many connections all processes of a worker may open, by resource; 0 without a limit. */
function ceilingsOf(snapshot) {
    const processes = snapshot.execution_pool === "prefork" ? snapshot.concurrency : 1;
    return new Map(Object.entries(snapshot.ceilings || {}).map(([name, most]) => [name, most * processes]));
}

/** Returns how many more connections the workers may open to servers that count them; null if that is unknown. */
function headRoom(workers) {
    let left = null;
    for (const snapshot of workers.flatMap((worker) => worker.snapshots)) {
        const open = new Map(snapshot.totals.map((each) => [each.name, value(each, "open")]));
        for (const [name, most] of ceilingsOf(snapshot)) {
            if (!most) {
                return null;
            }
            left = (left || 0) + Math.max(0, most - (open.get(name) || 0));
        }
    }
    return left;
}

// The rows of a worker's table.

/** Returns the groups of a worker: key, title, facts, resources, pid. */
function groupsOf(worker, processesShown) {
    const groups = [];
    worker.snapshots.forEach((snapshot, n) => {
        const which = worker.snapshots.length > 1 ? `, WorkerPools ${n + 1}` : "";
        const [first] = snapshot.processes;
        const alone = snapshot.processes.length === 1 && first.index === null && !snapshot.past.length;
        if (!alone) {
            groups.push({
                key: `${n}/all`,
                title: `All processes${which}`,
                facts: [],
                pid: null,
                taken: snapshot.taken,
                // Children that have gone have counted, too.
                started: snapshot.past.length ? 0 : Math.min(...snapshot.processes.map((each) => each.started)),
                resources: snapshot.totals,
                ceilings: ceilingsOf(snapshot),
            });
        }
        if (alone || processesShown) {
            groups.push(...snapshot.processes.map((process) => ({
                ...processGroup(process, snapshot.taken, worker.age, n),
                title: `Process ${process.pid}${alone ? which : ""}`,
                ceilings: alone ? ceilingsOf(snapshot) : new Map(),
            })));
        }
    });
    return groups;
}

/** Returns whether a process of the worker is shown with a retry budget. */
function paysForReplays(worker) {
    return worker.status !== "offline"
        && worker.snapshots.some((snapshot) => snapshot.processes.some((process) => process.capacity));
}

function processGroup(process, taken, since, n) {
    const facts = [process.index === null ? "main process" : `child ${process.index}`];
    if (process.capacity) {
        facts.push(`retry budget ${count(process.tokens)} of ${count(process.capacity)}`);
    }
    if (process.last_task) {
        facts.push(`last task ${age(Math.max(0, taken - process.last_task) + since)} ago`);
    } else if (process.last_task === 0) {
        facts.push("no task yet");
    }
    if (process.overflow) {
        facts.push(`${plural(process.overflow, "resource")} not shown: no space in shared memory`);
    }
    if (process.interrupted) {
        facts.push("stopped while publishing");
    }
    return {
        key: `${n}/${process.pid}`,
        facts,
        pid: process.pid,
        taken,
        started: process.started,
        resources: process.resources,
    };
}

/** Returns the key of a row's history. */
function rowKey(worker, group, resource) {
    return JSON.stringify([worker.name, group.key, resource.name]);
}

/** Fills the table of a worker. */
function fillTable(table, worker, groups, history, alerts) {
    keyed(table, groups, () => make("wp-group"), (body, group) => {
        const about = alerts.filter((alert) => alert.pid === group.pid);
        const whole = about.filter((alert) => !alert.resource && group.pid !== null);
        text(part(body, "title"), group.title);
        text(part(body, "facts"), [...group.facts, ...whole.map((alert) => `alert: ${ruleText(alert)}`)].join(" · "));
        const rows = group.resources.map((resource) => ({ ...resource, key: resource.name }));
        keyed(body, rows, () => make("wp-row"), (row, resource) => {
            fillRow(row, resource, history.of(rowKey(worker, group, resource)), group.ceilings.get(resource.name));
            const badges = about
                .filter((alert) => alert.resource === resource.name)
                .map((alert) => ({ ...alert, key: alert.rule }));
            keyed(part(row, "badges"), badges, badge, (element, alert) => {
                text(element, ruleText(alert));
                attribute(element, "title", alert.message);
            });
        });
    });
}

/** Returns the readable name of an alert's rule. */
function ruleText(alert) {
    return alert.rule.replaceAll("_", " ");
}

function badge() {
    const element = document.createElement("span");
    element.className = "wp-badge wp-badge-alert";
    return element;
}

function fillRow(row, resource, history, most) {
    const [open, inUse, limit] = ["open", "in_use", "limit"].map((name) => value(resource, name));
    text(part(row, "name"), resource.name);
    text(part(row, "kind"), resource.kind);
    fillUse(row, inUse, limit, history);
    text(part(row, "open"), most ? `${count(open)} of ${count(most)}` : count(open));
    attribute(part(row, "open"), "title", most ? `${CEILING} hold ${count(most)} at most. ${ASK}` : null);
    text(part(row, "idle"), count(value(resource, "idle")));
    text(part(row, "opened"), count(value(resource, "opened")));
    attribute(part(row, "opened"), "title", closings(resource) && `closed: ${closings(resource)}`);
    text(part(row, "pending"), count(value(resource, "pending")));
    part(row, "pending").classList.toggle("wp-strong", value(resource, "pending") > 0);
    text(part(row, "longest_wait"), seconds(longestWait(resource)));
    const [reused, opened] = acquisitions([resource]);
    text(part(row, "reused"), percent(reuseRatio(reused, opened)));
    attribute(part(row, "reused"), "title", `${count(reused)} of ${plural(reused + opened, "acquisition")}`);
    fillTroubles(part(row, "trouble"), resource);
}

function fillUse(row, inUse, limit, history) {
    const used = limit ? inUse / limit : null;
    text(part(row, "in_use"), limit ? `${count(inUse)} of ${count(limit)} · ${percent(used)}` : count(inUse));
    const bar = part(row, "bar");
    show(bar, limit > 0);
    bar.classList.toggle("wp-bar-high", used !== null && used >= HIGH);
    const width = `${Math.min(100, Math.round((used || 0) * 100))}%`;
    if (part(bar, "fill").style.width !== width) {
        part(bar, "fill").style.width = width;
    }
    const [line, area] = sparkline(history);
    attribute(part(row, "line"), "d", line);
    attribute(part(row, "area"), "d", area);
    const most = history.length ? `at most ${count(Number(Math.max(...history).toPrecision(2)))} acquisitions per second` : "";
    text(part(row, "history"), most && `, ${most}`);
    attribute(part(row, "use"), "title", most || null);
}

function fillTroubles(cell, resource) {
    const found = troubles(resource).map(([key, words, details], n, all) => (
        { key, words: n < all.length - 1 ? `${words},` : words, details }
    ));
    cell.classList.toggle("wp-none", !found.length);
    const shown = found.length ? found : [{ key: "", words: "none", details: "" }];
    keyed(cell, shown, () => document.createElement("span"), (element, trouble) => {
        text(element, trouble.words);
        attribute(element, "title", trouble.details || null);
    });
}

// The page's elements: only differences are applied, so focus, selection and scroll position survive a refresh.

export const byId = (id) => document.getElementById(id);

/** Returns a copy of a <template>'s only element. */
export function make(id) {
    return byId(id).content.firstElementChild.cloneNode(true);
}

/** Returns an element's part, by the name in its template. */
export function part(element, name) {
    return element.querySelector(`[data-part="${name}"]`);
}

/** Sets a text. The only way that text enters the page, so it is never parsed as markup. */
export function text(element, content) {
    if (element.textContent !== content) {
        element.textContent = content;
    }
}

export function attribute(element, name, content) {
    if (content === null) {
        element.removeAttribute(name);
    } else if (element.getAttribute(name) !== content) {
        element.setAttribute(name, content);
    }
}

export function show(element, visible) {
    if (element.hidden === visible) {
        element.hidden = !visible;
    }
}

/**
 * Gives an element one child per item, in order; existing children are reused by key.
 *
 * `make()` returns a new child, `update(child, item)` fills one. Other children of the element stay in front.
 */
export function keyed(parent, items, make, update) {
    const before = parent.keyed || new Map();
    const after = new Map(items.map((item) => [item.key, before.get(item.key) || make(item)]));
    for (const [key, child] of before) {
        if (!after.has(key)) {
            child.remove();
        }
    }
    // Moving an element removes its focus, so move only those out of place.
    let place = [...before.values()].find((child) => child.parentNode === parent) || null;
    for (const item of items) {
        const child = after.get(item.key);
        if (child === place) {
            place = place.nextElementSibling;
        } else {
            parent.insertBefore(child, place);
        }
        update(child, item);
    }
    parent.keyed = after;
}
