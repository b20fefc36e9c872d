"""Introspection of a running guest, from outside: the KVMI client, and what it finds in a Linux guest's memory.

It speaks the wire protocol of `softkvm.uapi.kvmi` and nothing else, so it works against any KVMI server.
"""
