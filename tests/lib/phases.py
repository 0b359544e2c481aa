#!/usr/bin/python3
"""A libvirt client that runs the phases of a migration one by one, as it is told, with whatever cookies it is given.

virsh carries the cookie from phase to phase as it is; a test of what happens when it does not needs a client of its own.
The phases' functions are exported by libvirt.so for libvirt's own use (libvirt 11.3, src/libvirt_private.syms), and are called
here as virDomainMigrateVersion3Full in libvirt-domain.c calls them.

One JSON object a line on standard input, one in return on standard output, {"error": TEXT} where libvirt refuses:

  {"phase": "begin",   "domain": NAME, "flags": N}                          -> {"cookie", "xml"}
  {"phase": "prepare", "host": URI, "xml": XML, "cookie": C, "flags": N}    -> {"cookie", "uri"}
  {"phase": "perform", "domain": NAME, "uri": URI, "cookie": C, "flags": N} -> {"cookie"}
  {"phase": "finish",  "host": URI, "domain": NAME, "cookie": C, "flags": N, "cancelled": BOOL} -> {"cookie"}
  {"phase": "migrate", "host": URI, "domain": NAME, "flags": N}             -> {}, all phases as virDomainMigrate2 runs them
  {"phase": "p2p",     "host": URI, "domain": NAME, "flags": N}             -> {}, the peer-to-peer migration of a client that stays
  {"phase": "look",    "domain": NAME}                                      -> {}, "save" takes this guest as it is known now
  {"phase": "save",    "path": FILE}                                        -> {}
  {"phase": "confirm", "domain": NAME, "cookie": C, "flags": N, "cancelled": BOOL} -> {}

"domain" is a guest of this host, but for finish, where it is the one that arrives. Connections stay open until the end of input.
"""

import json
import sys
from ctypes import (CDLL, POINTER, Structure, Union, byref, c_char, c_char_p, c_double, c_int, c_longlong, c_uint,
                    c_ulong, c_ulonglong, c_void_p, string_at)

libvirt = CDLL("libvirt.so.0")


class Value(Union):
    _fields_ = [("i", c_int), ("ui", c_uint), ("l", c_longlong), ("ul", c_ulonglong), ("d", c_double), ("b", c_char),
                ("s", c_void_p)]


class Parameter(Structure):
    _fields_ = [("field", c_char * 80), ("type", c_int), ("value", Value)]


class Error(Structure):
    _fields_ = [("code", c_int), ("domain", c_int), ("message", c_char_p)]


libvirt.virGetLastError.restype = POINTER(Error)
for name in ("virConnectOpen", "virDomainLookupByName", "virDomainMigrateBegin3Params", "virDomainMigrateFinish3Params",
             "virDomainMigrate2"):
    getattr(libvirt, name).restype = c_void_p

libvirt.virInitialize()
connections = {}


def succeeded(result):
    if not result:
        error = libvirt.virGetLastError()
        raise RuntimeError(error.contents.message.decode() if error else "libvirt gave no reason")
    return result


def connection(uri):
    if uri not in connections:
        connections[uri] = c_void_p(succeeded(libvirt.virConnectOpen(uri.encode())))
    return connections[uri]


def domain(name):
    return c_void_p(succeeded(libvirt.virDomainLookupByName(connection("qemu:///system"), name.encode())))


def parameters(**strings):
    """libvirt's typed parameters: the list and its length."""
    entries, count, room = POINTER(Parameter)(), c_int(0), c_int(0)
    for name, value in strings.items():
        if value is not None:
            libvirt.virTypedParamsAddString(byref(entries), byref(count), byref(room), name.encode(), value.encode())
    return entries, count


def given(cookie):
    """A cookie and its length, which includes the final NUL."""
    return (None, 0) if cookie is None else (cookie.encode(), c_int(len(cookie.encode()) + 1))


class Returned:
    """Where libvirt leaves a cookie."""

    def __init__(self):
        self.data, self.length = c_void_p(), c_int()

    def places(self):
        return byref(self.data), byref(self.length)

    def text(self):
        return string_at(self.data, self.length).rstrip(b"\0").decode() if self.data else None


def begin(ask):
    cookie = Returned()
    xml = libvirt.virDomainMigrateBegin3Params(domain(ask["domain"]), *parameters(), *cookie.places(), c_uint(ask["flags"]))
    return {"xml": string_at(succeeded(xml)).decode(), "cookie": cookie.text()}


def prepare(ask):
    cookie, uri = Returned(), c_void_p()
    params = parameters(destination_xml=ask["xml"])
    result = libvirt.virDomainMigratePrepare3Params(connection(ask["host"]), *params, *given(ask["cookie"]), *cookie.places(),
                                                    byref(uri), c_uint(ask["flags"]))
    succeeded(result == 0)
    return {"cookie": cookie.text(), "uri": string_at(uri).decode() if uri else None}


def perform(ask):
    cookie = Returned()
    params = parameters(migrate_uri=ask["uri"])
    result = libvirt.virDomainMigratePerform3Params(domain(ask["domain"]), None, *params, *given(ask["cookie"]),
                                                    *cookie.places(), c_uint(ask["flags"]))
    succeeded(result == 0)
    return {"cookie": cookie.text()}


def finish(ask):
    cookie = Returned()
    params = parameters(destination_name=ask["domain"])
    arrived = libvirt.virDomainMigrateFinish3Params(connection(ask["host"]), *params, *given(ask["cookie"]), *cookie.places(),
                                                    c_uint(ask["flags"]), c_int(ask["cancelled"]))
    # Cancelled, it returns no domain, and that is no error.
    succeeded(arrived or ask["cancelled"])
    return {"cookie": cookie.text()}


def confirm(ask):
    result = libvirt.virDomainMigrateConfirm3Params(domain(ask["domain"]), *parameters(), *given(ask["cookie"]),
                                                    c_uint(ask["flags"]), c_int(ask["cancelled"]))
    succeeded(result == 0)
    return {}


def migrate(ask):
    succeeded(libvirt.virDomainMigrate2(domain(ask["domain"]), connection(ask["host"]), None, c_ulong(ask["flags"]), None, None,
                                        c_ulong(0)))
    return {}


def p2p(ask):
    cookie = Returned()
    result = libvirt.virDomainMigratePerform3Params(domain(ask["domain"]), ask["host"].encode(), *parameters(), None, 0,
                                                    *cookie.places(), c_uint(ask["flags"]))
    succeeded(result == 0)
    return {}


looked = []


def look(ask):
    looked[:] = [domain(ask["domain"])]
    return {}


def save(ask):
    succeeded(libvirt.virDomainSave(looked[0], ask["path"].encode()) == 0)
    return {}


PHASES = {"p2p": p2p, "look": look, "save": save, "begin": begin, "prepare": prepare, "perform": perform, "finish": finish, "confirm": confirm, "migrate": migrate}

for line in sys.stdin:
    asked = json.loads(line)
    libvirt.virResetLastError()
    try:
        answer = PHASES[asked["phase"]](asked)
    except RuntimeError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
