"""The speed lab: stages, throughput, memory and operations of methods, beside the three arms that bound them.

`full` is the uncompressed model; `random` the price of the plumbing; `ideal` the stock model with features that
somebody chose at no cost.
"""
