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
