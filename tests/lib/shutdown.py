#!/usr/bin/python3
"""Tells whoever listens on this host's system bus that the host shuts down, in logind's name and words."""

import sys
from ctypes import CDLL, c_char_p, c_int, c_uint, c_void_p

gio = CDLL("libgio-2.0.so.0")
glib = CDLL("libglib-2.0.so.0")
gio.g_bus_get_sync.restype = gio.g_dbus_connection_call_sync.restype = glib.g_variant_new.restype = c_void_p

SYSTEM, NO_LIMIT = 1, -1
bus = gio.g_bus_get_sync(c_int(SYSTEM), None, None)
name = glib.g_variant_new(c_char_p(b"(su)"), c_char_p(b"org.freedesktop.login1"), c_uint(0))
owned = bus and gio.g_dbus_connection_call_sync(
    c_void_p(bus), b"org.freedesktop.DBus", b"/org/freedesktop/DBus", b"org.freedesktop.DBus", b"RequestName",
    c_void_p(name), None, c_int(0), c_int(NO_LIMIT), None, None)
told = owned and gio.g_dbus_connection_emit_signal(
    c_void_p(bus), None, b"/org/freedesktop/login1", b"org.freedesktop.login1.Manager", b"PrepareForShutdown",
    c_void_p(glib.g_variant_new(c_char_p(b"(b)"), c_int(1))), None)
if not (told and gio.g_dbus_connection_flush_sync(c_void_p(bus), None, None)):
    sys.exit("there is no system bus, or it does not let us")
