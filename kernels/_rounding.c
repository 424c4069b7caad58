/* Closed-form rounding of some columns of a weight matrix, one row after another; see kernels/rounding.py.
 *
 * Rows do not touch each other, so that a row's columns stay in the cache while each is rounded and its error spread over
 * those behind it. Every number is computed as tensor operations would compute it: one multiplication, one subtraction,
 * no fused ones, so that codes are the same bytes with and without this file.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>

typedef struct {
    float *weight, *numbers, *errors;                /* (rows, columns); errors (rows, stop - start) */
    const float *inverse, *scale, *zero_point, *top; /* (columns, columns); (rows, columns) twice; (rows,) */
    int64_t rows, columns, start, stop;
    int threads;
} Block;

static void round_row(const Block *b, int64_t row) {
    float *weight = b->weight + row * b->columns, *numbers = b->numbers + row * b->columns;
    float *errors = b->errors + row * (b->stop - b->start);
    const float *scale = b->scale + row * b->columns, *zero_point = b->zero_point + row * b->columns;
    const float top = b->top[row];
    for (int64_t j = b->start; j < b->stop; j++) {
        const float *spread = b->inverse + j * b->columns;
        float code = rintf(weight[j] / scale[j]) + zero_point[j];
        code = code < 0.0f ? 0.0f : code;
        code = code > top ? top : code;
        const float error = (weight[j] - (code - zero_point[j]) * scale[j]) / spread[j];
        for (int64_t k = j; k < b->stop; k++) {
            const float part = error * spread[k];
            weight[k] -= part;
        }
        numbers[j] = code;
        errors[j - b->start] = error;
    }
}

static PyObject *py_round_columns(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long a[12];
    if (given != 12) {
        PyErr_Format(PyExc_TypeError, "got %zd arguments, wanted 12", given);
        return NULL;
    }
    for (Py_ssize_t i = 0; i < given; i++) {
        a[i] = PyLong_AsLongLong(args[i]);
        if (a[i] == -1 && PyErr_Occurred()) return NULL;
    }
    float *address[7];
    for (int i = 0; i < 7; i++) address[i] = (float *)(intptr_t)a[i];
    const Block b = {
        .weight = address[0], .numbers = address[1], .errors = address[2], .inverse = address[3], .scale = address[4],
        .zero_point = address[5], .top = address[6], .rows = a[7], .columns = a[8], .start = a[9], .stop = a[10],
        .threads = (int)a[11],
    };
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel for schedule(static) num_threads(b.threads) if (b.threads > 1)
    for (int64_t row = 0; row < b.rows; row++) round_row(&b, row);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"round_columns", (PyCFunction)(void (*)(void))py_round_columns, METH_FASTCALL, "See kernels/rounding.py."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_rounding", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__rounding(void) { return PyModuleDef_Init(&module); }
