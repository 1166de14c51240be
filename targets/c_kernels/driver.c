/* Runs the model on samples from standard input: all inputs of a sample one after the other, as raw numbers in the
 * order of model.h; outputs go to standard output the same way. With a number N as argument every sample runs N times.
 */
#include <stdio.h>
#include <stdlib.h>

#include "model.h"

int main(int argc, char **argv)
{
    static unsigned char inputs[MODEL_INPUT_BYTES + 1], outputs[MODEL_OUTPUT_BYTES + 1];
    const void *from[MODEL_INPUTS + 1];
    void *to[MODEL_OUTPUTS + 1];
    const int runs = argc > 1 ? atoi(argv[1]) : 1;
    size_t at = 0;
    for (int i = 0; i < MODEL_INPUTS; at += model_input_bytes[i++])
        from[i] = inputs + at;
    at = 0;
    for (int i = 0; i < MODEL_OUTPUTS; at += model_output_bytes[i++])
        to[i] = outputs + at;
    while (fread(inputs, 1, MODEL_INPUT_BYTES, stdin) == MODEL_INPUT_BYTES) {
        for (int i = 0; i < runs; i++)
            model_run(from, to);
        if (fwrite(outputs, 1, MODEL_OUTPUT_BYTES, stdout) != MODEL_OUTPUT_BYTES)
            return 1;
    }
    return 0;
}
