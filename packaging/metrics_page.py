"""Writes docs/metrics.md from the code: `python packaging/metrics_page.py > docs/metrics.md` (make docs)."""

from edgebroker.broker.admin.exposition import families
from edgebroker.broker.observe.problems import ADVICE
from edgebroker.consumer.rest.metrics import NUMBERS, TOPIC_NUMBERS

HEAD = """# Metrics

`GET /metrics` on the admin interface (`listen.http`) answers in the text format of Prometheus. The data path only adds
to plain counters; a scrape reads them. Counters begin at 0 with each start.

```yaml
scrape_configs:
  - job_name: edgebroker
    static_configs:
      - targets: ["127.0.0.1:7421"]
```

Labels are bounded: names of topics and groups (groups without a name are not shown), numbers of partitions, codes and
problems from closed lists. At most 2,000 logs and 2,000 committed offsets are shown; `edgebroker_series_left_out`
counts the others.

What to watch, in this order:

1. `edgebroker_ready == 0`
2. `edgebroker_problem == 1`
3. `edgebroker_consumer_lag_seconds`
4. `time() - edgebroker_pipe_last_success_timestamp_seconds`: a healthy parent is silent for at most a minute and a half
5. `edgebroker_disk_days_left`
6. the 99th percentile of `edgebroker_sync_duration_seconds`

| Metric | Kind | Labels | Meaning |
|---|---|---|---|
"""
PROBLEMS = """
## Problems

The values of the label `problem`, and what to do; [operations.md](operations.md) says more.

| Problem | Do |
|---|---|
"""
APPLICATIONS = """
## Applications

`GET /metrics` of an application ([consumer.md](consumer.md)), at the address of its key `http`.

| Metric | Kind | Labels | Meaning |
|---|---|---|---|
"""


def page() -> str:
    """The whole document."""
    rows = [
        f"| `{family.name}` | {family.kind} | {', '.join(family.labels)} | {family.help} |\n" for family in families()
    ]
    problems = [f"| `{name}` | {text} |\n" for name, text in ADVICE.items()]
    of_applications = [f"| `{one.name}` | {one.kind} | | {one.help} |\n" for one in NUMBERS]
    of_applications += [f"| `{one.name}` | {one.kind} | topic | {one.help} |\n" for one in TOPIC_NUMBERS]
    return HEAD + "".join(rows) + PROBLEMS + "".join(problems) + APPLICATIONS + "".join(of_applications)


if __name__ == "__main__":
    print(page(), end="")
