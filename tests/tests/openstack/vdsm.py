"""Moves a guest as oVirt's VDSM does, and prints as JSON what VDSM would have seen.

As in vdsm/virt/migration.py (SourceThread, MonitorThread, Progress): one thread calls migrateToURI3 with a bandwidth that
is always set, a migration URI and the console's address, for a guest that VDSM defines on the other host by itself; another
sets the downtime, in steps, and polls jobStats(), which must say that the job is a migration that leaves (here: 20 times
as often as every 10 s).

usage: vdsm.py GUEST DESTINATION-URI MIGRATE-URI CONSOLE
"""

import json
import sys
import threading

import libvirt

guest, destination, migrate_uri, console = sys.argv[1:]
connection = libvirt.open("qemu:///system")
domain = connection.lookupByName(guest)
result = {"error": None, "polls": [], "after": None}


def migrate():
    params = {
        libvirt.VIR_MIGRATE_PARAM_BANDWIDTH: 52,
        libvirt.VIR_MIGRATE_PARAM_URI: migrate_uri,
        libvirt.VIR_MIGRATE_PARAM_GRAPHICS_URI: "vnc://" + console,
    }
    flags = (
        libvirt.VIR_MIGRATE_LIVE
        | libvirt.VIR_MIGRATE_PEER2PEER
        | libvirt.VIR_MIGRATE_ABORT_ON_ERROR
        | libvirt.VIR_MIGRATE_AUTO_CONVERGE
        | libvirt.VIR_MIGRATE_PERSIST_DEST
    )
    try:
        domain.migrateToURI3(destination, params, flags)
    except libvirt.libvirtError as error:
        result["error"] = error.get_error_message()


def ongoing(stats):
    return (
        stats.get("type", libvirt.VIR_DOMAIN_JOB_NONE) != libvirt.VIR_DOMAIN_JOB_NONE
        and stats["operation"] == libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT
    )


mover = threading.Thread(target=migrate)
mover.start()
downtime = 50
while mover.is_alive():
    mover.join(0.1)
    try:
        stats = domain.jobStats()
        if ongoing(stats):
            result["polls"].append(stats)
            downtime = min(downtime * 2, 500)
            domain.migrateSetMaxDowntime(downtime, 0)
    except libvirt.libvirtError as error:
        # It was over between two calls.
        if mover.is_alive():
            mover.join(5)
            if mover.is_alive():
                raise error
try:
    result["after"] = {"type": domain.jobStats(libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED)["type"]}
except libvirt.libvirtError:
    result["after"] = {"type": libvirt.VIR_DOMAIN_JOB_COMPLETED}
json.dump(result, sys.stdout)
