// Changes what differs and nothing else: focus, selection and scroll position outlive a refresh.

/** Returns a copy of a <template>'s one element. */
export function make(id) {
    return document.getElementById(id).content.firstElementChild.cloneNode(true);
}

/** Returns the part of an element that the template has named. */
export function part(element, name) {
    return element.querySelector(`[data-part="${name}"]`);
}

/** Sets a text. The only way in which text enters the page: nothing in it can be markup. */
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
 * Makes the children of an element those of `items`, in their order: by key, what was there before is kept.
 *
 * `make()` returns a new child, `update(child, item)` fills one. Children that were not made here stay in front.
 */
export function keyed(parent, items, make, update) {
    const before = parent.keyed || new Map();
    const after = new Map(items.map((item) => [item.key, before.get(item.key) || make(item)]));
    for (const [key, child] of before) {
        if (!after.has(key)) {
            child.remove();
        }
    }
    // To move an element takes its focus away: only those move that must.
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
