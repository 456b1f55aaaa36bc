"""Several KVM hosts on one machine: each a set of namespaces with its own libvirtd and agent.

A lab is a state directory and a short name. Its host processes, links and control groups carry that
name, so that several labs run side by side. `lab.lab.Lab` is the interface; `python -m lab` the command.
"""
