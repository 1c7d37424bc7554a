"""The paper's equations written as loops in float64, gradients included: slow and plain."""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def softmax(scores: Array) -> Array:
    exponentials = [math.exp(score - max(scores)) for score in scores]
    return np.array([value / sum(exponentials) for value in exponentials])


def position_attention(query_DN: Array, key_DM: Array, value_CM: Array) -> Array:
    """Equations (1) and (2) of one sample, one position at a time."""
    channels, queries = value_CM.shape[0], query_DN.shape[1]
    output_CN = np.zeros((channels, queries))
    for j in range(queries):
        scores = np.array([query_DN[:, j] @ key_DM[:, i] for i in range(key_DM.shape[1])])
        weights = softmax(scores)
        for i, weight in enumerate(weights):
            output_CN[:, j] += weight * value_CM[:, i]
    return output_CN


def position_attention_gradients(
    query_DN: Array, key_DM: Array, value_CM: Array, grad_CN: Array
) -> tuple[Array, Array, Array]:
    """d sum(grad * output) by query, key and value, from the derivative of the softmax."""
    grad_query, grad_key, grad_value = map(np.zeros_like, (query_DN, key_DM, value_CM))
    keys = key_DM.shape[1]
    for j in range(query_DN.shape[1]):
        weights = softmax(np.array([query_DN[:, j] @ key_DM[:, i] for i in range(keys)]))
        by_weight = np.array([grad_CN[:, j] @ value_CM[:, i] for i in range(keys)])
        mean = sum(weights[i] * by_weight[i] for i in range(keys))
        for i in range(keys):
            by_score = weights[i] * (by_weight[i] - mean)
            grad_query[:, j] += by_score * key_DM[:, i]
            grad_key[:, i] += by_score * query_DN[:, j]
            grad_value[:, i] += weights[i] * grad_CN[:, j]
    return grad_query, grad_key, grad_value


def channel_weights(features_CN: Array, affinity: str) -> Array:
    """Row j: how much channel j takes from each channel."""
    channels = features_CN.shape[0]
    rows = []
    for j in range(channels):
        energies = np.array([features_CN[j] @ features_CN[i] for i in range(channels)])
        if affinity == "reference":
            energies = max(energies) - energies
        rows.append(softmax(energies))
    return np.array(rows)


def channel_attention(features_CN: Array, affinity: str) -> Array:
    """Equations (3) and (4) of one sample, one channel at a time."""
    weights_CC = channel_weights(features_CN, affinity)
    output_CN = np.zeros_like(features_CN)
    for j, row in enumerate(weights_CC):
        for i, weight in enumerate(row):
            output_CN[j] += weight * features_CN[i]
    return output_CN


def channel_attention_gradient(features_CN: Array, affinity: str, grad_CN: Array) -> Array:
    weights_CC = channel_weights(features_CN, affinity)
    sign = -1.0 if affinity == "reference" else 1.0
    channels = features_CN.shape[0]
    gradient_CN = np.zeros_like(features_CN)
    for j in range(channels):
        by_weight = np.array([grad_CN[j] @ features_CN[i] for i in range(channels)])
        mean = weights_CC[j] @ by_weight
        for i in range(channels):
            gradient_CN[i] += weights_CC[j, i] * grad_CN[j]
            by_energy = sign * weights_CC[j, i] * (by_weight[i] - mean)
            gradient_CN[j] += by_energy * features_CN[i]
            gradient_CN[i] += by_energy * features_CN[j]
    return gradient_CN
