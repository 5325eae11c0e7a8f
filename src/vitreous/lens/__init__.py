"""Looking: what a model attends to, as numbers and maps.

look.py                    `look`: from a model and images to a reading, part by part
probe.py, probes/          what is read from a pass; one file per probe
batch_pass.py              one pass of a batch, in which all probes observe
formulas/                  the pure functions of probes and scores
tap/, coordinates/         every attention of any model while it happens, and where tokens are
token_coordinates.py       the coordinates of one attention's tokens, merged ones included
layer_features.py          keys, output and tokens of each layer on the grid of the image
direction.py               a direction of the features that points at the subject
foreground.py              where the subject is, without masks
evaluation.py              scores and curves of maps
faithfulness.py            whether the model depends on what a map marks
reading.py, metadata.py    the reading, its folder, and the records that describe it
preserve_state.py          a model is afterwards as it was before
"""
