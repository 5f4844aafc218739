// Reads and formats the numbers of a snapshot's resource. Snapshots omit numbers that are 0.

/** Returns a number; the sum of a label's values. */
export function value(resource, name) {
    const found = resource[name];
    if (found && typeof found === "object") {
        return Object.values(found).reduce((sum, each) => sum + each, 0);
    }
    return found || 0;
}

/** Returns whether acquisitions are known; they are not for a value created by a plain function. */
export function acquired(resource) {
    return Boolean(resource.acquire_wait || value(resource, "reused"));
}

/** Returns the longest wait, including waits in progress, in seconds; null without acquisitions. */
export function longestWait(resource) {
    const now = value(resource, "longest_wait");
    return now || acquired(resource) ? Math.max(now, resource.acquire_wait ? resource.acquire_wait.max : 0) : null;
}

/** Returns the numbers of acquisitions that reused a connection and that opened one. */
export function acquisitions(resources) {
    const known = resources.filter(acquired);
    return ["reused", "opened"].map((name) => known.reduce((sum, each) => sum + value(each, name), 0));
}

/** Returns the reasons for which a resource's connections were closed, as text. */
export function closings(resource) {
    return Object.entries(resource.closed || {}).map(([reason, n]) => `${reason} ${count(n)}`).join(", ");
}

/** Returns the fraction of acquisitions that reused a connection, from 0 to 1; null before the first. */
export function reuseRatio(reused, opened) {
    return reused + opened ? reused / (reused + opened) : null;
}

export function count(number) {
    return number.toLocaleString("en");
}

export function plural(number, one, many) {
    return `${count(number)} ${number === 1 ? one : many || `${one}s`}`;
}

/** Returns a fraction as a percentage; only 1 is shown as 100 %, and only 0 as 0 %. */
export function percent(part) {
    if (part === null) {
        return "—";
    }
    const rounded = Math.round(part * 100);
    return `${part < 1 ? Math.min(rounded, 99) : rounded} %`;
}

/** Formats a duration; null if unknown. */
export function seconds(time) {
    if (time === null) {
        return "—";
    }
    if (!time) {
        return "0 s";
    }
    if (time < 0.001) {
        return "< 1 ms";
    }
    return time < 1 ? `${Math.round(time * 1000)} ms` : age(time, time < 10 ? 1 : 0);
}

/** Formats an age. */
export function age(time, digits = 0) {
    if (time < 60) {
        return `${time.toFixed(digits)} s`;
    }
    if (time < 3600) {
        return `${Math.floor(time / 60)} min`;
    }
    const hours = Math.floor(time / 3600);
    return hours < 48 ? `${hours} h ${Math.floor((time % 3600) / 60)} min` : `${Math.floor(hours / 24)} days`;
}

const TROUBLES = [
    ["acquire_timeouts", "timeout"],
    ["failures", "failure"],
    ["failed_checks", "failed check"],
    ["replays", "replay"],
    ["retries", "retry", "retries"],
    ["refused_replays", "refused replay"],
    ["resolved_commits", "resolved commit"],
    ["leaks", "leak"],
];

/** Returns [name, text, details] for each count of troubles that is not 0. */
export function troubles(resource) {
    const stale = resource.closed ? resource.closed.stale || 0 : 0;
    // What a restart or reload of the server leaves, also where it was found before use and nothing failed.
    const closed = stale ? [["stale", plural(stale, "stale connection"), "closed by their server"]] : [];
    return [...closed, ...counted(resource)];
}

function counted(resource) {
    return TROUBLES.filter(([name]) => value(resource, name)).map(([name, one, many]) => {
        const found = resource[name];
        const details = typeof found === "object" ? Object.entries(found).map(([kind, n]) => `${kind} ${n}`) : [];
        return [name, plural(value(resource, name), one, many), details.join(", ")];
    });
}

// What this page has seen of each row: enough for a sparkline, lost with the page.

const LENGTH = 60;
// A short history does not fill the whole width, or it would look like a long one.
const SHORT = 20;
const WIDTH = 96;
const HEIGHT = 24;

export class History {
    constructor() {
        this.rows = new Map();
    }

    /**
     * Appends the rate at which a counter has grown, per second.
     *
     * The first rate of a key is that since `started`, so that a run shorter than the page's interval is seen, too.
     */
    add(key, total, taken, started) {
        const row = this.rows.get(key) || { rates: [], total: 0, taken: started };
        if (row.taken && taken > row.taken) {
            // A worker that was started again counts from 0.
            row.rates.push(Math.max(0, total - row.total) / (taken - row.taken));
        }
        if (row.rates.length > LENGTH) {
            row.rates.shift();
        }
        this.rows.set(key, { rates: row.rates, total, taken });
    }

    /** Returns a key's rates, oldest first. */
    of(key) {
        return this.rows.has(key) ? this.rows.get(key).rates : [];
    }

    /** Drops every key that is not in `keys`. */
    keep(keys) {
        for (const key of this.rows.keys()) {
            if (!keys.has(key)) {
                this.rows.delete(key);
            }
        }
    }
}

/** Returns the line of a sparkline and the area below it, as path data; the newest number is at the right edge. */
export function sparkline(seen) {
    if (!seen.length) {
        return ["", ""];
    }
    // One number is a line, too.
    const numbers = seen.length === 1 ? [seen[0], seen[0]] : seen;
    const scale = Math.max(...numbers) || 1;
    const step = WIDTH / (Math.max(numbers.length, SHORT) - 1);
    const points = numbers.map((number, n) => {
        const x = WIDTH - (numbers.length - 1 - n) * step;
        // A line on the very edge would be clipped.
        const y = HEIGHT - 1 - (number / scale) * (HEIGHT - 2);
        return `${x.toFixed(1)} ${y.toFixed(1)}`;
    });
    const line = `M${points.join("L")}`;
    return [line, `${line}L${WIDTH} ${HEIGHT}L${points[0].split(" ")[0]} ${HEIGHT}Z`];
}
