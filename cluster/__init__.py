"""Everything that runs on Ray: the trainer and its workers, the accountant, the command line.

``cli``       the commands
``config``    the configuration of a run
``trainer``   the driver: prepares, runs the workers, writes the report
``worker``    what runs in every worker
"""
