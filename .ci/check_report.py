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
    if report["backends_killed"] < 4:
        found.append(f"{report['backends_killed']} database connections were cut; each of 4 children has one")

    opened = report["connections_opened"]
    for resource, count in opened.items():
        if count < 1:
            found.append(f"{resource} opened no connection at all")
    # One for each child and resource, and one for each that was cut: the database's by name, and the HTTP server's
    # connections, of which each child has one, closed at the same moment.
    bound = report["children"] * len(opened) + report["backends_killed"] + report["children"]
    if sum(opened.values()) > bound:
        found.append(f"{sum(opened.values())} connections were opened, more than {bound}: {opened}")
    return found


if __name__ == "__main__":
    report = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps(report, indent=2))
    sys.exit("\n".join(problems(report)) or 0)
