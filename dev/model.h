// model.h: declares the interface of a model, as the rest of the program uses it. train_gpas.c and
// train_gpas.cu each define a struct Model and these functions.
#ifndef MODEL_H
#define MODEL_H
#include "options.h"

typedef struct Model Model;

// Creates a network with memory for B sequences of --seq-len tokens. Its parameters have their
// initial values, except with --load or --resume, when the caller fills them. Without `training` it
// has no gradients. Exits if there is not enough memory. o must outlive the model.
void model_create(Model *m, const Options *o, int B, int training);
void model_free(Model *m);

// Computes the logits of tokens (B,T). With targets (B,T) returns the mean loss in nats, else 0.
double model_forward(Model *m, const int *tokens, const int *targets, int B, int T);

// Computes the gradient of scale times the sum of the losses of the last model_forward(), which
// must have had these tokens and targets, and adds it to the gradients.
void model_backward(Model *m, const int *tokens, const int *targets, int B, int T, double scale);

// Continues one sequence: computes the logits of positions `first` to T - 1 of tokens (T), where
// the positions before `first` were computed by earlier calls and have not changed. With targets
// (T) returns the mean loss of positions `first` to T - 1, else 0.
double model_extend(Model *m, const int *tokens, const int *targets, int first, int T);

// Returns the logits (V) of row n of the last model_forward(), or of position n if model_extend()
// was called last and computed that position.
const float *model_logits(Model *m, int n);

void zero_gradients(Model *m);

// Returns the norm of the whole gradient. Writes the norm of each layer's gradient to layers (L),
// and the joint norm of all gates' gradients to *gates.
double gradient_norms(Model *m, double *layers, double *gates);

// Makes the AdamW update of step 0, 1, ..., given the norms that gradient_norms() found.
void model_update(Model *m, int step, double norm, double gate_norm);

// Writes the variances of the outputs of layer l's two sublayers in the last model_forward(), and
// the layer's gate, NAN if it has none.
void layer_state(Model *m, int l, int B, int T, double variances[2], double *gate);

// Writes a description of the device to text (TEXT_SIZE bytes).
void model_device(const Model *m, char *text);

// The part of a network's state that files store: `list.size` floats in each array.
typedef struct {
    const Options *o;
    TensorList list;
    float *parameters, *gradients, *adam_m, *adam_v;
} Snapshot;

// Returns the model's state, in memory that the model still owns.
Snapshot model_snapshot(Model *m);

// Makes the model use the numbers in the arrays of its snapshot, after the caller has changed them.
void model_restore(Model *m);
#endif
