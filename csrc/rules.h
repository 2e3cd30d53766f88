// The list of update rules: a new one is its header and its line here.
#pragma once

#include "rules/adadelta.h"
#include "rules/adagrad.h"
#include "rules/adam.h"
#include "rules/lion.h"
#include "rules/rmsprop.h"
#include "rules/sgd.h"

// Calls X(rule) for each, in the order of their indices.
#define FASTLR_FOR_EACH_RULE(X) X(Sgd) X(Adam) X(Rmsprop) X(Adagrad) X(Adadelta) X(Lion)
