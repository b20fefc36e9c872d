"""VM introspection (KVMI): a tool outside the guest reads and changes it, and is asked before what it wants to be asked about.

Answers to "VM introspection" v9 (kvm@vger 20200721210922.7646). `ioctls.py` is the VMM's door, `session.py` one connection's permissions
and life, `socket_channel.py` and `direct_channel.py` the ways to the tool, `dispatch.py` and `*_commands.py` what it may ask, `vcpu.py`
jobs, pauses and waits of a vCPU, `exits.py` the events. Message layouts and dialects are in `uapi/kvmi.py`.
"""
