"""Drop-ins for people who come from GeomLoss (`otdd.compat.geomloss`) and POT (`otdd.compat.pot`).

The same calls, conventions and optima, on otdd's solvers. Neither library has to be installed.
"""
