"""Checks the report of ``./demo --once --report FILE``: python .ci/check_report.py FILE."""

import json
import sys
from pathlib import Path


def problems(report: dict) -> list[str]:
    """What is wrong with a report, as sentences; nothing when it is as it should be.

    Args:
        report: What the demo wrote.
    """
    found = []
    if report["failed"] != 0 or report["succeeded"] != report["tasks"]:
        found.append(f"{report['succeeded']} of {report['tasks']} tasks succeeded, {report['failed']} failed")
    if report["tasks"] < 2000:
        found.append(f"only {report['tasks']} tasks ran; the demo is 2,000")
    for table, count in report["rows"].items():
        if count != report["rows_expected"][table]:
            found.append(f"{count} {table} were written, not {report['rows_expected'][table]}")
    if report["connections_at_stop"] != 0:
        found.append(f"the worker left {report['connections_at_stop']} connections behind")
    if report["cache_killed"] < 4:
        found.append(f"{report['cache_killed']} Redis connections were cut; each of 4 children has one")
    if report["backends_killed"] < 4:
        found.append(f"{report['backends_killed']} database connections were cut; each of 4 children has one")

    children, opened = report["children"], report["connections_opened"]
    # One for each child, and one for each that was cut. An HTTP connection was closed by the server once, and by its
    # client whenever it was idle for 4 s, which on a slow machine happens; the asynchronous client has two.
    closed = 1 + int(report["seconds"] / 4)
    bounds = {
        "db": children + report["backends_killed"],
        "cache": children + report["cache_killed"],
        "api": children * (1 + closed),
        "carrier": children * (1 + closed),
        "suppliers": 2 * children * (1 + closed),
    }
    for resource, count in opened.items():
        if not children <= count <= bounds[resource]:
            found.append(
                f"{count} connections of {resource} were opened by {children} children, not {bounds[resource]}"
            )
    return found


if __name__ == "__main__":
    report = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps(report, indent=2))
    sys.exit("\n".join(problems(report)) or 0)
