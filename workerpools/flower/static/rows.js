// The tables of the workers: a group of rows for all processes of one, and a group for each process.

import { attribute, keyed, make, part, show, text } from "./dom.js";
import { sparkline } from "./history.js";
import {
    acquisitions, age, count, longestWait, percent, plural, reuseRatio, seconds, troubles, value,
} from "./numbers.js";

// From here on a bar tells by more than its length that little is left.
const HIGH = 0.8;

/** Returns the groups of a worker: key, title, facts, resources, pid. */
export function groupsOf(worker, processesShown) {
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
                resources: snapshot.totals,
            });
        }
        if (alone || processesShown) {
            groups.push(...snapshot.processes.map((process) => ({
                ...processGroup(process, Math.max(0, snapshot.taken - process.published) + worker.age, n),
                title: `Process ${process.pid}${alone ? which : ""}`,
            })));
        }
    });
    return groups;
}

function processGroup(process, published, n) {
    const facts = [process.index === null ? "main process" : `child ${process.index}`];
    if (process.capacity) {
        facts.push(`retry budget ${count(process.tokens)} of ${count(process.capacity)}`);
    }
    if (process.published) {
        facts.push(`published ${age(published)} ago`);
    }
    if (process.overflow) {
        facts.push(`${plural(process.overflow, "resource")} not shown, for want of room in shared memory`);
    }
    if (process.interrupted) {
        facts.push("stopped in the middle of publishing");
    }
    return {
        key: `${n}/${process.pid}`,
        facts,
        pid: process.pid,
        resources: process.resources,
    };
}

/** Returns the key under which the history of a row is kept. */
export function rowKey(worker, group, resource) {
    return JSON.stringify([worker.name, group.key, resource.name]);
}

/** Fills the table of a worker. */
export function fillTable(table, worker, groups, history, alerts) {
    keyed(table, groups, () => make("wp-group"), (body, group) => {
        const about = alerts.filter((alert) => alert.pid === group.pid);
        const whole = about.filter((alert) => !alert.resource && group.pid !== null);
        text(part(body, "title"), group.title);
        text(part(body, "facts"), [...group.facts, ...whole.map((alert) => `alert: ${ruleText(alert)}`)].join(" · "));
        const rows = group.resources.map((resource) => ({ ...resource, key: resource.name }));
        keyed(body, rows, () => make("wp-row"), (row, resource) => {
            fillRow(row, resource, history.of(rowKey(worker, group, resource)));
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

/** Returns the name of an alert's rule for people. */
export function ruleText(alert) {
    return alert.rule.replaceAll("_", " ");
}

function badge() {
    const element = document.createElement("span");
    element.className = "wp-badge wp-badge-alert";
    return element;
}

function fillRow(row, resource, history) {
    const [open, inUse, limit] = ["open", "in_use", "limit"].map((name) => value(resource, name));
    text(part(row, "name"), resource.name);
    text(part(row, "kind"), resource.kind);
    fillUse(row, inUse, limit, history);
    text(part(row, "open"), count(open));
    text(part(row, "idle"), count(value(resource, "idle")));
    text(part(row, "pending"), count(value(resource, "pending")));
    part(row, "pending").classList.toggle("wp-strong", value(resource, "pending") > 0);
    text(part(row, "longest_wait"), seconds(longestWait(resource)));
    const [reused, opened] = acquisitions([resource]);
    text(part(row, "reused"), percent(reuseRatio(reused, opened)));
    attribute(part(row, "reused"), "title", `${count(reused)} reused, ${count(value(resource, "opened"))} opened`);
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
    const [line, area] = sparkline(history, limit);
    attribute(part(row, "line"), "d", line);
    attribute(part(row, "area"), "d", area);
    text(part(row, "history"), history.length > 1 ? `, at most ${count(Math.max(...history))} while this page was open` : "");
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
