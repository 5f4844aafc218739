// What the page remembers of numbers that it has seen: enough for a sparkline, and gone when the page is.

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
