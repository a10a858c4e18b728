"""What can be wrong with a node, by name, and what its operator should do: for the log, `status` and the metrics.

docs/operations.md says the same at more length; a test holds the two together.
"""

ADVICE = {
    "certificate": "it is renewed by itself as soon as the root can be asked",
    "clock": "set the clock; until then certificates are not judged by their age",
    "damaged": "it is fetched again from the parent by itself; at an origin: edgebroker repair --from NODE; to go on "
    "without the records: edgebroker topic alter TOPIC --on-damage skip",
    "descriptors": "raise the limit of open files (LimitNOFILE in the unit, ulimit -n); nothing is lost, and writing "
    "is tried again",
    "disk_full": "free space or raise storage.max_bytes; who is gone for good: edgebroker child forget NAME, "
    "edgebroker group delete GROUP; writing resumes by itself",
    "disk_stalled": "check the disk (dmesg); nothing is lost, what is in memory is still delivered",
    "fleet_full": "remove nodes that are gone: edgebroker node remove --silent TIME",
    "history_lost": "fetch the records from a child: edgebroker repair --from NODE; or give them up: "
    "edgebroker topic accept TOPIC",
    "limits": "it ends a minute after the last time; who is connected: GET /v1/clients; delete topics and groups that "
    "have no use, or raise the limit that is named if it is meant to be so much",
    "metadata": "check space and rights of the data directory; it is tried again every second",
    "name_clash": "only this node's is served; to keep its records under another name and take the parent's topic: "
    "edgebroker topic rename TOPIC NEW-NAME --yes here",
    "not_carried": "nothing has to be done here; where the topic belongs to a node above, see why it is not there",
    "not_mirrored": "free space if that is the reason; to take a topic that was deleted: "
    "edgebroker topic undelete TOPIC here",
    "parent": "check the line and the parent; this node goes on serving what it has",
    "read_only": "check the disk (dmesg), then restart the node; what was acknowledged is safe",
    "registry": "free space, or install the release that wrote registry.db; it is tried again every second",
    "removed_early": "raise storage.max_bytes, or set the retention that is meant; storage.on_full = refuse keeps "
    "everything and refuses producers",
    "replaced": "if the parent's log is the right one: edgebroker topic accept TOPIC",
    "resync": "edgebroker resync --status says which resync waits for what",
    "snapshot_failed": "the table keeps its history until it has a snapshot; free space, raise storage.max_bytes, or "
    "write it from the whole content: edgebroker publish TOPIC --snapshot --csv FILE --key-column COLUMN",
    "superseded": "start this node below the promoted one: node.level below it, pipe.parents = its address; what only "
    "this node has is kept aside then",
    "trust": "give it a token of the root of the fleet: edgebroker join TOKEN",
    "two_origins": "it takes no more records for these topics; start it below this node, or undo the promotion: "
    "edgebroker promote --undo here",
    "unserved_topics": "check the disk and the rights of the topic's directory, then restart the node",
}
# While one of these lasts, the node is not ready: nothing can be published.
BLOCKING = ("read_only", "disk_full", "disk_stalled")
