"""Online reweighting of training samples by their losses in the current batch.

`weighting` turns losses into weights, `gathering` brings the losses of all processes together, `sequences` gives one
loss per sequence, `reweighter` is the loss for any loop, `trainer` puts it under a `transformers.Trainer`.

Source: Sow, Woisetschläger, Bulusu, Wang, Jacobsen, Liang, "Dynamic Loss-Based Sample Reweighting for Improved Large
Language Model Pretraining", ICLR 2025, arXiv 2502.06733; checked against the authors' published trainer.
"""
