// Shows what the servers allow, and what the workers may open: the answers to the button "Ask the servers".

import { age, count, plural } from "./numbers.js";
import { attribute, byId, keyed, make, part, show, text } from "./view.js";

const UNASKED = "How many connections the servers allow, and who else has some, is known when they are asked: "
    + "Flower then opens one connection for each database and cache, and closes it.";

/**
 * Shows the servers' answers.
 *
 * `found` is the document, null before the first; `since()` returns the age of a moment of Flower's clock, in seconds.
 */
export function drawServers(found, wanted, since) {
    show(byId("wp-servers"), found !== null && found.workers.length > 0);
    if (found === null) {
        return;
    }
    const { asking, asked, problem, budget } = found.servers;
    byId("wp-ask").disabled = wanted || asking;
    text(byId("wp-ask"), asked === null ? "Ask the servers" : "Ask again");
    const done = asked === null ? "" : `Asked ${age(since(asked))} ago`;
    text(byId("wp-servers-asked"), wanted || asking ? "Asking the servers…" : [done, fleet(budget)].join(""));
    text(byId("wp-servers-note"), problem || UNASKED);
    show(byId("wp-servers-note"), budget === null);
    show(byId("wp-limits"), budget !== null);
    if (budget !== null) {
        keyed(byId("wp-limits"), serversOf(budget.limits), () => make("wp-group"), fillServer);
    }
}

function fleet(budget) {
    if (budget === null) {
        return "";
    }
    const sum = (name) => budget.workers.reduce((before, each) => before + each[name], 0);
    return ` · ${plural(sum("count"), "worker")}, ${plural(sum("processes"), "process", "processes")}`;
}

function serversOf(limits) {
    const servers = [...new Set(limits.map((each) => each.server))];
    return servers.map((server) => ({ key: server, limits: limits.filter((each) => each.server === server) }));
}

function fillServer(body, server) {
    text(part(body, "title"), server.key);
    body.querySelector("th").colSpan = 8;
    const rows = server.limits.map((each) => ({ ...each, key: each.limit }));
    keyed(body, rows, () => make("wp-limit"), fillLimit);
}

function fillLimit(row, limit) {
    text(part(row, "name"), limit.limit);
    text(part(row, "note"), note(limit));
    number(row, "most", limit.most);
    number(row, "reserved", limit.reserved);
    number(row, "others", limit.others);
    const clients = Object.entries(limit.clients).map(([who, n]) => `${count(n)} ${who}`).join(", ");
    attribute(part(row, "others"), "title", clients && `open now: ${clients}`);
    number(row, "sum", limit.sum, "no limit");
    const parts = Object.entries(limit.resources).map(([name, most]) => `${name} ${most === null ? "no limit" : count(most)}`);
    attribute(part(row, "sum"), "title", parts.join(", "));
    number(row, "head_room", limit.head_room);
    const known = limit.head_room !== null;
    const tight = known && !limit.waits && limit.head_room < limit.sum;
    part(row, "head_room").classList.toggle("wp-tight", tight);
    part(row, "head_room").classList.toggle("wp-over", tight && limit.head_room < 0);
    fits(row, "largest", known, limit.largest_concurrency);
    fits(row, "overlapping", known, limit.largest_concurrency_in_a_deploy);
}

function note(limit) {
    const names = Object.keys(limit.resources).join(", ");
    if (limit.most === null) {
        return `${names} · not known: ${limit.unknown}`;
    }
    return limit.waits ? `${names} · above it, transactions wait for each other` : names;
}

function number(row, name, found, unknown = "?") {
    text(part(row, name), found === null ? unknown : count(found));
}

function fits(row, name, known, found) {
    text(part(row, name), known ? (found === null ? "any" : found ? count(found) : "none") : "?");
}
