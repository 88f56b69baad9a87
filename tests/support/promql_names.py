"""What PromQL queries name: metrics and the labels that they ask of them."""

import re

import promql_parser

_VARIABLES = {"$__rate_interval": "1m", "$cluster": "127.0.0.1:8000", "$worker": ".*"}


def with_values(expr, **values):
    """A dashboard's query with its variables filled in as Grafana does it."""
    for variable, value in (_VARIABLES | {f"${name}": value for name, value in values.items()}).items():
        expr = expr.replace(variable, value)
    assert "$" not in expr, f"a variable without a value in {expr}"
    return expr


def selected(expr):
    """Each metric that a query names, with the labels that stand in its braces. Raises for what is no PromQL."""
    found = []

    def note(node):
        if isinstance(node, promql_parser.MatrixSelector):
            node = node.vector_selector
        if isinstance(node, promql_parser.VectorSelector):
            found.append((node.name, {matcher.name for matcher in node.matchers.matchers}))

    promql_parser.walk(promql_parser.parse(expr), note)
    return found


def grouped(expr):
    """The labels that a query keeps or joins by."""
    groups = re.findall(r"\b(?:by|on|without|ignoring) ?\(([^)]*)\)", str(promql_parser.parse(expr)))
    return {label.strip() for group in groups for label in group.split(",") if label.strip()}
