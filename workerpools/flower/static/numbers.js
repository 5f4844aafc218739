// Reads the numbers of a snapshot's resource, and writes them for people. Numbers that are 0 are left out of snapshots.

/** Returns a number; all of a label's values together. */
export function value(resource, name) {
    const found = resource[name];
    if (found && typeof found === "object") {
        return Object.values(found).reduce((sum, each) => sum + each, 0);
    }
    return found || 0;
}

/** Tells whether anybody is known to have acquired a connection: of a value that a function made, nothing tells. */
export function acquired(resource) {
    return Boolean(resource.acquire_wait || value(resource, "reused"));
}

/** Returns the longest that anybody waited, or has waited by now, in seconds; null if nobody acquired anything. */
export function longestWait(resource) {
    const now = value(resource, "longest_wait");
    return now || acquired(resource) ? Math.max(now, resource.acquire_wait ? resource.acquire_wait.max : 0) : null;
}

/** Returns how many acquisitions of resources got an open connection, and how many opened one. */
export function acquisitions(resources) {
    const known = resources.filter(acquired);
    return ["reused", "opened"].map((name) => known.reduce((sum, each) => sum + value(each, name), 0));
}

/** Returns which part of the acquisitions got an open connection, from 0 to 1; null before the first. */
export function reuseRatio(reused, opened) {
    return reused + opened ? reused / (reused + opened) : null;
}

export function count(number) {
    return number.toLocaleString("en");
}

export function plural(number, one, many) {
    return `${count(number)} ${number === 1 ? one : many || `${one}s`}`;
}

/** Returns a part as a percentage; only the whole is 100 %, and only nothing is 0 %. */
export function percent(part) {
    if (part === null) {
        return "—";
    }
    const rounded = Math.round(part * 100);
    return `${part < 1 ? Math.min(rounded, 99) : rounded} %`;
}

/** Returns a time that something took; null is one that is not known. */
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

/** Returns how long ago something was, or how long it has been so. */
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
    ["acquire_timeouts", "time-out"],
    ["failures", "failure"],
    ["failed_checks", "failed check"],
    ["replays", "replay"],
    ["retries", "retry", "retries"],
    ["refused_replays", "refused replay"],
    ["resolved_commits", "resolved commit"],
    ["leaks", "leak"],
];

/** Returns what has gone wrong, as [name, text, details] for each number that is not 0. */
export function troubles(resource) {
    return TROUBLES.filter(([name]) => value(resource, name)).map(([name, one, many]) => {
        const found = resource[name];
        const details = typeof found === "object" ? Object.entries(found).map(([kind, n]) => `${kind} ${n}`) : [];
        return [name, plural(value(resource, name), one, many), details.join(", ")];
    });
}

// The history of numbers that this page has seen: enough for a sparkline, and gone with the page.

const LENGTH = 60;
// A short history does not fill the whole width: it would look like a long one.
const SHORT = 20;
const WIDTH = 96;
const HEIGHT = 24;

export class History {
    constructor() {
        this.rows = new Map();
    }

    /** Remembers a number, and returns what is remembered under that key, the oldest first. */
    add(key, number) {
        const row = this.rows.get(key) || [];
        row.push(number);
        if (row.length > LENGTH) {
            row.shift();
        }
        this.rows.set(key, row);
        return row;
    }

    /** Returns what is remembered under a key. */
    of(key) {
        return this.rows.get(key) || [];
    }

    /** Forgets every key that is not among `keys`. */
    keep(keys) {
        for (const key of this.rows.keys()) {
            if (!keys.has(key)) {
                this.rows.delete(key);
            }
        }
    }
}

/** Returns the line of a sparkline and the area below it, as path data; the newest number is at the right edge. */
export function sparkline(numbers, top) {
    if (numbers.length < 2) {
        return ["", ""];
    }
    const scale = Math.max(top, ...numbers) || 1;
    const step = WIDTH / (Math.max(numbers.length, SHORT) - 1);
    const points = numbers.map((number, n) => {
        const x = WIDTH - (numbers.length - 1 - n) * step;
        // A line at the very edge would be cut in half.
        const y = HEIGHT - 1 - (number / scale) * (HEIGHT - 2);
        return `${x.toFixed(1)} ${y.toFixed(1)}`;
    });
    const line = `M${points.join("L")}`;
    return [line, `${line}L${WIDTH} ${HEIGHT}L${points[0].split(" ")[0]} ${HEIGHT}Z`];
}
