// Shows a document of Flower's about the connection pools of its workers.

import { attribute, keyed, make, part, show, text } from "./dom.js";
import { History } from "./history.js";
import { acquisitions, age, count, longestWait, percent, plural, reuseRatio, seconds, value } from "./numbers.js";
import { fillTable, groupsOf, rowKey, ruleText } from "./rows.js";

// With more processes than this they are shown on demand.
const FEW = 8;

const STATUS = { online: "online", silent: "not answering", offline: "offline" };

const byId = (id) => document.getElementById(id);

export class View {
    constructor(root) {
        this.workerUrl = root.dataset.workerUrl;
        this.history = new History();
        this.taken = new Map();
        this.opened = new Map();
        this.document = null;
        byId("wp-filter").addEventListener("input", () => this.draw());
    }

    /** Shows a document in place of the one before. */
    update(found) {
        const first = this.document === null;
        this.document = found;
        this.remember();
        this.draw();
        if (first && location.hash) {
            // What the address points to was not there when the page came.
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
                    if (fresh) {
                        this.history.add(key, value(resource, "in_use"));
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
        text(byId("wp-open"), `${count(sum("open"))} open, ${count(sum("idle"))} idle`);
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

/** Returns every alert with its worker, the oldest first. */
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
        found.push(`last heard of ${age(worker.age)} ago`);
    }
    return found.filter(Boolean);
}

function notes(worker) {
    const found = [];
    if (!worker.readable) {
        found.push("What this worker answers cannot be read: its workerpools is of another version.");
    } else if (worker.age === null) {
        found.push("This worker has not answered yet.");
    } else if (worker.status === "silent") {
        found.push("These are its last numbers. A worker that runs tasks in its main process cannot answer meanwhile.");
    } else if (worker.status === "offline") {
        found.push("These are its last numbers.");
    } else if (worker.snapshots.every((snapshot) => !snapshot.totals.length)) {
        found.push("No resource is declared in this worker.");
    }
    const unseen = Math.max(0, ...worker.snapshots.map((snapshot) => snapshot.unseen));
    if (unseen && worker.status === "online") {
        found.push(`${plural(unseen, "child publishes", "children publish")} nothing, just starting or for want of room `
            + "in shared memory.");
    }
    return found;
}

function emptiness(workers, without, asked, problem, wanted) {
    if (workers.length) {
        return ["Nothing here has that in its name", `No worker and no resource has “${wanted}” in its name.`];
    }
    if (without.length) {
        return [
            `${plural(without.length, "worker")} without connection pools`,
            `${without.join(", ")}: no WorkerPools is declared in the app. With pools = WorkerPools(app) its connections `
                + "are shown here.",
        ];
    }
    if (problem) {
        return ["Nothing is known of any worker", "This page goes on asking."];
    }
    return asked === null
        ? ["Asking the workers…", ""]
        : ["No worker has answered", "The page shows the first one as soon as it does."];
}
