"""Results documents for tests of what is made of them."""

from kvmnest.reports.model import OUTCOMES


def case(name, outcome, series=3, **more):
    return {"id": name, "outcome": outcome, "series": series, "detail": "", **more}


def document(*cases, **more):
    return {
        "schema": 1,
        "kernel": "6.1.0-56-cloud-amd64",
        "summary": {name: sum(c["outcome"] == name for c in cases) for name in OUTCOMES},
        "complete": True,
        "planned": len(cases),
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 1.5,
        "not_run": [],
        "no_longer_known": [],
        "problems": [],
        "cases": list(cases),
        **more,
    }


def column(**outcomes):
    return document(*(case(name, outcome) for name, outcome in outcomes.items()))


def empty(problem):
    return document(kernel=None, problems=[problem], complete=False)
