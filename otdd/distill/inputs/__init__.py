"""Images of a user: one module for each kind of input, each of which makes a `Listing`.

`otdd.distill.inputs.spec.open_listing` is the one door: it reads `--data` and calls the module.
Listing opens no image. `otdd.distill.data` then holds all images, `otdd.distill.stream` reads
them range by range.
"""
