"""``dist-dp bench``: what a private step costs beside a step without privacy, on this machine.

``settings``   what is measured, and the named presets
``clicks``     records computed from their number: a loader's source without a file
``model``      one sharded collection under two dense models, one of them plain TorchRec
``contenders`` a step of each mechanism, and of plain TorchRec
``field``      builds them all, as in the middle of a run
``rounds``     turns in rotating order, timed
``memory``     the highest resident memory of a turn
``results``    medians, spreads and ratios, as they go to JSON
``world``      the processes of a run
``tables``     the same for people
``scaling``    step time against table size, and its plot
``microbenchmarks``, ``table_benchmarks``  what kinds of work cost on this machine
``machine``    its rates, for the cost model
``check_model``  measured steps beside its predictions
"""
