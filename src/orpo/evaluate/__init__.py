"""Evaluation: held-out pairs, generation, IFEval, judged answers, retention. Everything calls the engine or the model's own generate."""
