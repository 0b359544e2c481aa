"""Moves a guest as OpenStack Nova does, and prints as JSON what Nova would have seen.

As in nova/virt/libvirt: Guest.migrate() calls migrateToURI3 in one thread, always with a bandwidth (0: no limit, its
default) and with the destination's XML twice; driver.py polls Guest.get_job_info() in another, every half second
(here: five times as often).

usage: nova.py GUEST DESTINATION-URI MIGRATE-URI
"""

import json
import sys
import threading

import libvirt

guest, destination, migrate_uri = sys.argv[1:]
connection = libvirt.open("qemu:///system")
domain = connection.lookupByName(guest)
result = {"error": None, "polls": [], "after": None}


def migrate():
    xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE | libvirt.VIR_DOMAIN_XML_SECURE)
    params = {
        "bandwidth": 0,
        "destination_xml": xml,
        "persistent_xml": xml,
        "migrate_uri": migrate_uri,
    }
    flags = (
        libvirt.VIR_MIGRATE_LIVE
        | libvirt.VIR_MIGRATE_PEER2PEER
        | libvirt.VIR_MIGRATE_PERSIST_DEST
        | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
    )
    try:
        domain.migrateToURI3(destination, params=params, flags=flags)
    except libvirt.libvirtError as error:
        result["error"] = error.get_error_message()


def job_info():
    """What Guest.get_job_info() makes of it: a guest that is gone has completed."""
    try:
        return domain.jobStats()
    except libvirt.libvirtError as error:
        if error.get_error_code() in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID):
            return {"type": libvirt.VIR_DOMAIN_JOB_COMPLETED}
        raise


mover = threading.Thread(target=migrate)
mover.start()
while mover.is_alive():
    result["polls"].append(job_info())
    mover.join(0.1)
result["after"] = job_info()
json.dump(result, sys.stdout)
